"""torchvision's models at small image sizes: one or two of each architecture, random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise, randomise_all, seeded

# torchvision registers fake kernels for operators of its C++ library, which need not be there.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402

Built = tuple[nn.Module, tuple[torch.Tensor, ...]]

IMAGES = {
    64: """alexnet densenet121 efficientnet_b0 efficientnet_v2_s googlenet mnasnet0_5
        mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18
        resnet50 resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1
        swin_t swin_v2_t convnext_tiny""",
    32: "vgg11 vgg11_bn",
    96: "inception_v3",
    224: "vit_b_32 maxvit_t",
}
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large " \
               "lraspp_mobilenet_v3_large"
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d mvit_v1_b swin3d_t"
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False},
    "vit_b_32": {"image_size": 64}, "maxvit_t": {"input_size": (224, 224)},
}
_SIZES = {"vit_b_32": 64}
# Forty residual blocks of redrawn weights overflow its gates: there only constants are redrawn.
_GENTLE = {"efficientnet_v2_s"}


def _image(name: str, size: int) -> Built:
    with seeded(0):
        module = torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))
        redraw = randomise if name in _GENTLE else randomise_all
        return redraw(module), (images(size=_SIZES.get(name, size)),)


def _segmentation(name: str) -> Built:
    with seeded(0):
        make = getattr(torchvision.models.segmentation, name)
        return randomise_all(make(weights=None, weights_backbone=None)), (images(size=64),)


def _video(name: str) -> Built:
    frames, size = (16, 224) if name.startswith(("mvit", "s3d")) else (8, 32)
    with seeded(0):
        module = getattr(torchvision.models.video, name)(weights=None)
        clip = torch.stack([images(size=size) for _ in range(frames)], 2)
        return randomise_all(module), (clip,)


MODELS: dict[str, Callable[[], Built]] = {
    **{name: partial(_image, name, size) for size, names in IMAGES.items()
       for name in names.split()},
    **{name: partial(_segmentation, name) for name in SEGMENTATION.split()},
    **{name: partial(_video, name) for name in VIDEO.split()},
}
