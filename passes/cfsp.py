"""CFSP's fine score: relative weights of a slice, in consumers and producers, times its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Cfsp:
    """score_j = ||X_j||^c * mean over d of (R[|W| ||X||^b] + sum over producers P of R[|P|'])_dj.

    W (outputs x features) are consumers, P (features x inputs) producers (gate and up of an MLP).
    R divides by sums along `relative`: "column" as released, where each column then sums to one
    and the score is ||X_j||^c times a constant; "row" relates features to each other.
    CFSP, COLING 2025 (`three_w_one_wa`, b = c = 1); the coarse score is an allocation.
    """

    name: ClassVar[str] = "cfsp"
    needs: ClassVar[tuple[str, ...]] = ("moments",)
    b: float = 1.0
    c: float = 1.0
    relative: str = "column"

    def __post_init__(self) -> None:
        if self.relative not in ("column", "row"):
            raise TypeError("relative must be 'column' or 'row'")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        for view in ctx.consumers(group):
            norm = view.moments.norm
            own = view.weight.double().abs() * norm.unsqueeze(1).pow(self.b)
            parts = view.onto(self._share(own) * norm.pow(self.c))
            for member in group.members:
                if member.role == "producer":
                    rows = ctx.rows(member, group).double().abs()
                    flat = self._share(rows.flatten(0, -2).T.unsqueeze(0)).reshape(group.shape)
                    parts = parts + flat * view.onto(norm.pow(self.c))
            total += parts
        return total

    def _share(self, w: torch.Tensor) -> torch.Tensor:
        """(shared, outputs, features) -> mean over outputs of relative weights."""
        whole = w.sum(1 if self.relative == "column" else 2, keepdim=True)
        return (w / whole.clamp(min=1e-30)).mean(1)
