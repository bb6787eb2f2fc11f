"""Magnitude: a slice matters as much as its weights are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.members import REDUCTIONS, reduced
from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group, Member


@dataclass(frozen=True)
class Magnitude:
    """score_i = mean over the group's weights of |w|^p, p = `norm` (1 or 2).

    The mean (not the sum) over members lets groups of different sizes compare. Gains, biases and
    buffers (one value a slice) do not count. Group mean of L2: DepGraph, CVPR 2023.
    With `reduce`, each member's channels are scored by their norm ||w||_p, and coupled members by
    the sum, mean, max, prod, first or last of theirs (LLM-Pruner, NeurIPS 2023).
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[tuple[str, ...]] = ()
    norm: int = 2
    reduce: str = "weights"

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise TypeError("norm must be 1 or 2")
        if self.reduce not in ("weights", *REDUCTIONS):
            raise TypeError(f"reduce must be weights or one of {', '.join(REDUCTIONS)}")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        members = [m for m in group.members if m.role != "carrier"]
        if self.reduce != "weights":
            return reduced([self._norms(m, group, ctx) for m in members], self.reduce)
        total, count = torch.zeros(group.shape, dtype=torch.float64), 0.0
        for member in members:
            sums, each = ctx.powers(member, group, self.norm)
            total, count = total + sums, count + each
        return total / max(count, 1)

    def _norms(self, member: Member, group: Group, ctx: Context) -> torch.Tensor:
        powers = ctx.stored(member.weight).double().abs().pow(self.norm)
        return ctx.onto(powers, member, group, lambda sums: sums.pow(1 / self.norm))
