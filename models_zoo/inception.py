"""Inception: four parallel branches of unequal width, one of them a pool, concatenated."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Inception(nn.Module):
    """The branches write into one tensor at fixed offsets."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        one, three, five, pooled = widths
        self.branches = nn.ModuleList(
            [
                _conv(inputs, one, 1),
                nn.Sequential(_conv(inputs, three + 2, 1), _conv(three + 2, three, 3)),
                nn.Sequential(
                    _conv(inputs, five - 1, 1),
                    _conv(five - 1, five, (1, 5)),
                    _conv(five, five, (5, 1)),
                ),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(inputs, pooled, 1)),
            ]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 10, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            Inception(10, (6, 9, 5, 4)),
            nn.MaxPool2d(2),
            Inception(24, (7, 11, 8, 5)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(31, 7),
        )
        return randomise_all(model), (images(),)
