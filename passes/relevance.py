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

    R is propagated from each example's largest logit by layer-wise relevance propagation, z+ rule
    (see `spacompiler.relevance`). Yeom et al., Pruning by explaining, Pattern Recognition 2021.
    Made for CNNs; a handful of examples is enough.
    """

    name: ClassVar[str] = "relevance"
    needs: ClassVar[tuple[str, ...]] = ("relevance",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return ctx.gate("relevance", group)
