"""ResNet: additions tie the channels of a whole stage together, through a downsample too.

A basic block, a basic block with a strided projection, and a bottleneck on the identity.
"""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), where the shortcut is a projection if the shapes differ."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut if shortcut is not None else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def _basic(inputs: int, middle: int, outputs: int, stride: int = 1) -> Residual:
    body = nn.Sequential(
        _conv_norm(inputs, middle, 3, stride),
        nn.ReLU(),
        _conv_norm(middle, outputs, 3),
    )
    same = stride == 1 and inputs == outputs
    return Residual(body, None if same else _conv_norm(inputs, outputs, 1, stride))


def _bottleneck(channels: int, middle: int) -> Residual:
    body = nn.Sequential(
        _conv_norm(channels, middle, 1),
        nn.ReLU(),
        _conv_norm(middle, middle, 3),
        nn.ReLU(),
        _conv_norm(middle, channels, 1),
    )
    return Residual(body)


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            _conv_norm(3, 12, 3, stride=2),
            nn.ReLU(),
            _basic(12, 18, 12),
            _basic(12, 22, 26, stride=2),
            _bottleneck(26, 10),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(26, 7),
        )
        return randomise_all(model), (images(),)
