"""MLP-Mixer: between two transposes, a linear layer mixes positions instead of channels."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each added to the residual stream."""

    def __init__(self, patches: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = _mlp(patches, token_hidden)
        self.norm2 = nn.LayerNorm(width)
        self.channels = _mlp(width, channel_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, two mixer blocks, the mean over positions and a classifier."""

    def __init__(self, width: int = 22, patches: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.blocks = nn.Sequential(
            MixerBlock(patches, width, 12, 34), MixerBlock(patches, width, 10, 38)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.classify(self.norm(self.blocks(x)).mean(dim=1))


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        return randomise_all(Mixer()), (images(),)
