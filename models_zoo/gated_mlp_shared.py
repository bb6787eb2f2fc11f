"""A gated MLP with sharing: one linear layer is called twice, and the head is the embedding.

A shared weight ties the channels of every place it is used in.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from spacompiler.models_zoo._seeded import randomise_all, seeded, tokens


class SharedGatedMLP(nn.Module):
    """Gate and value come from one layer by `chunk`; `mix` is applied before and after them."""

    def __init__(self, vocabulary: int = 53, width: int = 22, hidden: int = 34) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.gated = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.mix(self.embed(ids)))
        gate, value = self.gated(x).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * value)
        return self.head(self.norm(self.mix(x)))


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two rows of tokens."""
    with seeded(seed):
        return randomise_all(SharedGatedMLP()), (tokens(53),)
