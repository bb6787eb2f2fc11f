"""VGG: plain convolutions, then a flatten that makes each channel a run of H*W linear inputs."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            *_stage(3, 10),
            *_stage(10, 14),
            *_stage(14, 22),
            nn.Flatten(),
            nn.Linear(22 * 4 * 4, 30),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(30, 7),
        )
        return randomise_all(model), (images(),)
