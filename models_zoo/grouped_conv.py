"""ResNeXt-type grouped convolutions and a grouped linear layer: groups must stay equal in size."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded

GROUPS = 4


class GroupedBlock(nn.Module):
    """A bottleneck whose middle convolution works in groups, added to its input."""

    def __init__(self, channels: int, middle: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, middle, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.grouped = nn.Conv2d(middle, middle, 3, padding=1, groups=GROUPS, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.restore = nn.Conv2d(middle, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.reduce(x)))
        y = torch.relu(self.norm2(self.grouped(y)))
        return torch.relu(x + self.norm3(self.restore(y)))


class GroupedLinear(nn.Module):
    """One small matrix per group of features, written as an einsum."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        shape = (GROUPS, inputs // GROUPS, outputs // GROUPS)
        self.weight = nn.Parameter(torch.randn(shape) * (inputs // GROUPS) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(1, (GROUPS, -1))
        return torch.einsum("bgi,gio->bgo", grouped, self.weight).flatten(1) + self.bias


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 20, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(20),
            nn.ReLU(),
            GroupedBlock(20, 24),
            nn.Conv2d(20, 28, 3, stride=2, padding=1, groups=GROUPS),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            GroupedLinear(28, 36),
            nn.ReLU(),
            nn.Linear(36, 7),
        )
        return randomise_all(model), (images(),)
