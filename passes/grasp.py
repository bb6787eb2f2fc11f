"""GraSP: before training, a weight matters as much as the gradient's norm would fall without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Grasp:
    """score_i = sum over the slice's weights of w (H g), H the Hessian and g the gradient.

    Removing w changes |g|^2 / 2 by -w (H g) to first order: what keeps the gradient flowing stays,
    what hinders it goes first (scores may be negative). GraSP, ICLR 2020, whose S is the negative
    of this. Give it the training loss and training data; backward runs twice.
    """

    name: ClassVar[str] = "grasp"
    needs: ClassVar[tuple[str, ...]] = ("hessian",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return torch.stack([ctx.sums("hessian", m, group) for m in group.members]).sum(0)
