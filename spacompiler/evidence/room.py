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

from ..store.mapped import let_go
from ..system.staging import Scratch

LIMIT = 1 << 30
"""Bytes that are held in memory."""
FEW = 1 << 20
"""Bytes of what is not worth a file."""


@dataclass(eq=False)
class Room:
    """How much is `held` in memory, and how much lies in files, in bytes; `limit` is the most that
    is held, `LIMIT` where none is given."""

    limit: int | None = None
    held: int = 0
    filed: int = 0

    def take(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of a value in float64, of its shape, where there is room for it.

        Raises OSError where a file is needed and the disk is full.
        """
        fits = self._fits(8 * value.numel())
        made = value.to(torch.float64, copy=True) if fits else \
            _mapped(tuple(value.shape), torch.float64).copy_(value)
        return self._counted(made, "held" if fits else "filed")

    def lay(self, value: torch.Tensor) -> torch.Tensor:
        """Return a value as it is while there is room in memory, else a copy that lies in a file.

        What is on another device stays there. Raises OSError where the disk is full.
        """
        if value.device.type != "cpu" or value.nbytes < FEW:
            return value
        if self._fits(value.nbytes):
            return self._counted(value, "held")
        made = _mapped(tuple(value.shape), value.dtype).copy_(value)
        let_go([made])
        return self._counted(made, "filed")

    def _fits(self, size: int) -> bool:
        return self.held + size <= (LIMIT if self.limit is None else self.limit)

    def _counted(self, made: torch.Tensor, kind: str) -> torch.Tensor:
        self._count(kind, made.nbytes)
        weakref.finalize(made, self._count, kind, -made.nbytes)
        return made

    def _count(self, kind: str, size: int) -> None:
        setattr(self, kind, getattr(self, kind) + size)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An array in a file without a name: it is gone when nothing refers to it."""
    with Scratch() as folder:
        file = folder / "sums"
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no signal later
            with open(file, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, dtype.itemsize * prod(shape))
        return torch.from_file(str(file), shared=True, size=prod(shape),
                               dtype=dtype).reshape(shape)
