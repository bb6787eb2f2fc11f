"""DenseNet: every layer reads the concatenation of all before it, each at its own offset."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


class DenseBlock(nn.Module):
    """Layers of unequal growth, normalised before their convolution as in the original."""

    def __init__(self, inputs: int, growths: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for growth in growths:
            conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
            layers.append(nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), conv))
            inputs += growth
        self.layers = nn.ModuleList(layers)
        self.outputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return torch.cat(features, dim=1)


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.AvgPool2d(2),
    )


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        first = DenseBlock(12, (6, 7, 9))
        second = DenseBlock(18, (5, 8))
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False),
            first,
            _transition(first.outputs, 18),
            second,
            nn.BatchNorm2d(second.outputs),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(second.outputs, 7),
        )
        return randomise_all(model), (images(),)
