"""Relevance: a channel matters as much as it explains the network's decisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Relevance:
    """score_i = sum over examples and positions of |R| at every place where slice i is read.

    R is propagated from each example's true class (the likeliest one, where batches bring no
    labels) by layer-wise relevance propagation. Yeom et al., Pruning by explaining, Pattern
    Recognition 2021: as released for ResNets, z+ for convolutions, the epsilon rule for linear
    layers, every example starting from 1; without `published` as the paper writes it, z+ for all
    products, starting from the logit. Made for CNNs; a handful of examples is enough.
    """

    name: ClassVar[str] = "relevance"
    published: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that calibration gathers."""
        return ("relevance" if self.published else "relevance_positive",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return ctx.gate(self.needs[0], group)
