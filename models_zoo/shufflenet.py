"""ShuffleNet: half the channels skip a block, and a shuffle interleaves the halves after it."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _branch(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, stride, padding=1, groups=outputs, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def shuffle(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    """Deal the channels of each group out in turn: a b c | d e f becomes a d b e c f."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class Split(nn.Module):
    """Leave one half of the channels alone and work on the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, worked = x.chunk(2, dim=1)
        return shuffle(torch.cat([kept, self.branch(worked)], dim=1))


class Downsample(nn.Module):
    """Both branches read everything at half the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs // 2, 1, bias=False),
            nn.BatchNorm2d(outputs // 2),
            nn.ReLU(),
        )
        self.right = _branch(inputs, outputs // 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return shuffle(torch.cat([self.left(x), self.right(x)], dim=1))


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            Split(12),
            Downsample(12, 20),
            Split(20),
            nn.Conv2d(20, 26, 1, bias=False),
            nn.BatchNorm2d(26),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(26, 7),
        )
        return randomise_all(model), (images(),)
