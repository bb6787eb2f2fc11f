"""Room on the disk for arrays that need not stay in memory while nobody looks at them.

Each lies in a file without a name, shown in memory: the system writes it out and reads it again as
it likes, and the file is gone when the array is, however the process ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import nn

LARGE = 1 << 29
"""Bytes of a model from which on a second one is not held in memory."""


def is_large(model: object) -> bool:
    """True for a module whose weights are not to be held twice."""
    return isinstance(model, nn.Module) and sum(p.nbytes for p in model.parameters()) >= LARGE


class Room:
    """Makes arrays that lie in files in a directory (the nearest to a path that is there)."""

    def __init__(self, place: Path) -> None:
        self.folder = next(folder for folder in place.absolute().parents if folder.is_dir())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an array without values; one in memory where the system shows no files there.

        Raises OSError if the disk is full.
        """
        count = prod(shape)
        if not count or not os.path.isdir("/proc/self/fd"):
            return torch.empty(*shape, dtype=dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=count,
                                   dtype=dtype).reshape(*shape)
