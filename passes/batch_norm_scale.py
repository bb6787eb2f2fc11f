"""Batch-norm scale: a channel matters as much as its normalisation scales it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.errors import SpaError
from spacompiler.evidence import members as coupling
from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class BatchNormScale:
    """score_i = sum of |gamma_i| over the group's normalisation gains.

    Sharpest where training has put an L1 penalty on the gains. Network slimming, ICCV 2017.
    """

    name: ClassVar[str] = "batch-norm-scale"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape); raises SpaError for a group without a normalisation gain."""
        gains = coupling.gains(ctx.solution)
        found = [ctx.rows(m, group).double().abs().sum(-1)
                 for m in group.members if m.weight in gains]
        if not found:
            raise SpaError(f"group {group.name} has no normalisation with a gain",
                           fix=f"use another importance pass, or --ignore '{group.name}'")
        return torch.stack(found).sum(0)
