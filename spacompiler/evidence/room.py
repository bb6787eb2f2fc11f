"""Room for large sums: in memory up to a limit, beyond it in files that vanish with them.

A criterion of curvature, or an allocation that measures, needs the covariances of all layers at
once: they grow with the square of the widths and can be several times the model. What lies in a
file is mapped, so that the system may write it out; arithmetic on it is the same to the bit.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from math import prod

import torch

from ..system.staging import Scratch

LIMIT = 1 << 30
"""Bytes that are held in memory."""


@dataclass(eq=False)
class Room:
    """How much is `held` in memory, and how much lies in files, in bytes."""

    held: int = 0
    filed: int = 0

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of a value in float64, of its shape, where there is room for it.

        Raises OSError where a file is needed and the disk is full.
        """
        size = 8 * value.numel()
        if self.held + size <= LIMIT:
            made, kind = value.to(torch.float64, copy=True), "held"
        else:
            made, kind = _mapped(tuple(value.shape)).copy_(value), "filed"
        self._count(kind, size)
        weakref.finalize(made, self._count, kind, -size)
        return made

    def _count(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + size)


def _mapped(shape: tuple[int, ...]) -> torch.Tensor:
    """A float64 array in a file without a name: it is gone when nothing refers to it."""
    with Scratch() as folder:
        file = folder / "sums"
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no signal later
            with open(file, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, 8 * prod(shape))
        return torch.from_file(str(file), shared=True, size=prod(shape),
                               dtype=torch.float64).reshape(shape)
