"""Magnitude: a slice matters as much as its weights are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.groups import Group
from spacompiler.protocols import Context


@dataclass(frozen=True)
class Magnitude:
    """score_i = mean over the group's weights of |w|^p, p = `norm` (1 or 2).

    The mean (not the sum) over members lets groups of different sizes compare. Gains, biases and
    buffers (one value a slice) do not count. Group mean of L2: DepGraph, CVPR 2023.
    """

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[tuple[str, ...]] = ()
    norm: int = 2

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise TypeError("norm must be 1 or 2")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape): the mean of |w|^norm over each slice."""
        total, count = torch.zeros(group.shape, dtype=torch.float64), 0
        for member in group.members:
            if member.role == "carrier":
                continue
            rows = ctx.rows(member, group)
            total += rows.abs().pow(self.norm).sum(-1, dtype=torch.float64)
            count += rows.shape[-1]
        return total / max(count, 1)
