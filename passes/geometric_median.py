"""Geometric median: filters near the middle of their layer can be made up for by the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class GeometricMedian:
    """score_i = sum over j of ||F_i - F_j||_2, F_i the weights that produce slice i.

    The filter nearest to the geometric median of its layer goes first; producers add up, and a
    fibred group compares slices under the same outer one. FPGM, CVPR 2019.
    """

    name: ClassVar[str] = "geometric-median"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        for member in group.members:
            if member.role == "producer":
                filters = ctx.rows(member, group).double()
                total += torch.cdist(filters, filters).sum(-1)
        return total
