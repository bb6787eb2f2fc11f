"""Random scores: the control that every criterion must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class RandomScores:
    """Uniform in [0, 1), seeded by the run's seed and the group's name."""

    name: ClassVar[str] = "random"
    needs: ClassVar[tuple[str, ...]] = ()

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        seed = zlib.crc32(f"{ctx.seed}:{group.name}".encode())
        return torch.rand(group.shape, generator=torch.Generator().manual_seed(seed))
