"""Every float model that torchvision builds, at small image sizes, with random weights.

Detection models take lists of images and choose boxes by data: they are traced in parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise, randomise_all, seeded

# torchvision registers fake kernels for operators of its C++ library, which need not be there.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402
from torchvision.models import list_models  # noqa: E402


def _nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Non-maximum suppression in Python, for where the C++ library does not load."""
    overlap = (torchvision.ops.box_iou(boxes, boxes) > iou_threshold).numpy()
    gone, kept = np.zeros(len(boxes), dtype=bool), []
    for i in scores.argsort(descending=True).tolist():
        if not gone[i]:
            kept.append(i)
            gone |= overlap[i]
    return torch.tensor(kept, dtype=torch.long)


if not torchvision.extension._has_ops():
    torchvision.ops.boxes.nms = _nms
    torchvision.ops.roi_align.__globals__["_assert_has_ops"] = lambda: None

Built = tuple[nn.Module, tuple[Any, ...]]
DETECTION = torchvision.models.detection
# prefix of a model's name -> side of its images (the longest prefix counts; else 64)
_SIZES = {"vgg": 32, "inception": 96, "maxvit": 224, "vit_h": 56, "mvit": 224, "s3d": 224,
          "raft": 128, "swin3d": 32, "r3d": 32, "mc3": 32, "r2plus1d": 32, "ssd300": 300,
          "ssdlite": 320}
_OPTIONS: dict[str, dict[str, Any]] = {
    # auxiliary heads run in training only, and published weights come without them
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "vit_b": {"image_size": 64}, "vit_l": {"image_size": 64}, "vit_h": {"image_size": 56},
    "maxvit_t": {"input_size": (224, 224)},
}
_FRAMES = {"mvit": 16, "s3d": 16}
# Forty residual blocks of redrawn weights overflow gates, and boxes shrink to nothing: there only
# constants are redrawn.
_GENTLE = ("efficientnet", "regnet_y", "raft", "fasterrcnn", "maskrcnn", "keypointrcnn")


def _by_prefix(table: dict[str, Any], name: str, default: Any) -> Any:
    fitting = [prefix for prefix in table if name.startswith(prefix)]
    return table[max(fitting, key=len)] if fitting else default


def _module(name: str, **options: Any) -> nn.Module:
    with seeded(0):
        options |= _by_prefix(_OPTIONS, name, {})
        module = torchvision.models.get_model(name, weights=None, **options)
        return (randomise if name.startswith(_GENTLE) else randomise_all)(module)


def _image(name: str) -> Built:
    return _module(name), (images(size=_by_prefix(_SIZES, name, 64)),)


def _segmentation(name: str) -> Built:
    return _module(name, weights_backbone=None), (images(size=64),)


def _video(name: str) -> Built:
    size = _by_prefix(_SIZES, name, 64)
    with seeded(0):
        clip = [images(size=size) for _ in range(_by_prefix(_FRAMES, name, 8))]
    return _module(name), (torch.stack(clip, 2),)


def _flow(name: str) -> Built:
    with seeded(0):
        pair = [images(size=128) for _ in range(2)]
    return _module(name), (*pair,)


def _detection(name: str) -> Built:
    size = _by_prefix(_SIZES, name, 128)
    module = _module(name, weights_backbone=None).eval()
    module.transform.min_size, module.transform.max_size = (size,), size
    if hasattr(module, "roi_heads"):  # untrained scores are low; the heads shall see boxes
        module.roi_heads.score_thresh, module.roi_heads.detections_per_img = 0.0, 10
    return module, (list(images(size=size)),)


_KINDS: dict[Any, Callable[[str], Built]] = {
    torchvision.models.segmentation: _segmentation, torchvision.models.video: _video,
    torchvision.models.optical_flow: _flow, DETECTION: _detection,
}
_MADE = {name: make for kind, make in _KINDS.items() for name in list_models(kind)}
MODELS: dict[str, Callable[[], Built]] = {
    name: partial(_MADE.get(name, _image), name) for name in list_models()
    if not name.startswith("quantized")}


def _natural(name: str) -> Built:
    """A classifier as its users build it: images of 224 (or 299), drawn weights untouched."""
    size = 299 if name.startswith("inception") else 224
    with seeded(0):
        module = torchvision.models.get_model(
            name, weights=None, **_OPTIONS.get(name, {})).eval()
        return module, (images(size=size),)


# for comparisons of speed: nothing is proved, and other tools run the model for real
NATURAL: dict[str, Callable[[], Built]] = {
    name: partial(_natural, name) for name in MODELS if name not in _MADE}
