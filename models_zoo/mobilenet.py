"""MobileNet: inverted residuals, where depthwise filters and squeeze-excite follow one width."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the global average of all of them."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(x)


class InvertedResidual(nn.Module):
    """Expand, filter depthwise, gate, project; add the input when the shape is unchanged."""

    def __init__(self, inputs: int, wide: int, outputs: int, stride: int, squeezed: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(),
            SqueezeExcite(wide, squeezed),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return x + y if self.residual else y


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 10, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(10),
            nn.Hardswish(),
            InvertedResidual(10, 22, 10, stride=1, squeezed=6),
            InvertedResidual(10, 26, 14, stride=2, squeezed=7),
            InvertedResidual(14, 30, 14, stride=1, squeezed=9),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(14, 7),
        )
        return randomise_all(model), (images(),)
