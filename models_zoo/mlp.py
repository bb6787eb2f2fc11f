"""A three-layer MLP with BatchNorm1d: the smallest network in which channels are coupled."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import randomise_all, seeded


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two rows of features."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Linear(14, 26),
            nn.BatchNorm1d(26),
            nn.ReLU(),
            nn.Linear(26, 18),
            nn.BatchNorm1d(18),
            nn.ReLU(),
            nn.Linear(18, 7),
        )
        return randomise_all(model), (torch.randn(2, 14),)
