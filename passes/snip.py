"""SNIP: before training, a connection matters as much as the loss is sensitive to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Snip:
    """score_i = sum over the slice's weights of |w dL/dw| at initialisation, batches added up.

    The sensitivity |dL/dc| of a connection's switch c = 1; the published division by the total
    over all connections changes no order and is left out. SNIP, ICLR 2019. Give it the training
    loss and one large batch of training data.
    """

    name: ClassVar[str] = "snip"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("elements",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return torch.stack([ctx.sums("elements", m, group) for m in group.members]).sum(0)
