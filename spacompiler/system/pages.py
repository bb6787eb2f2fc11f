"""Memory that shows a file: its pages can go at any moment, as the file still has them.

A checkpoint that is mapped into memory costs none until it is read; what was read stays until the
system needs the room, and counts as the process's. Whoever is done with an array says so here, and
a model of any size takes no more memory than what is looked at.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np

LEAST = 1 << 20
"""Bytes below which nothing is given back: asking would cost more."""
_DONTNEED = 4
_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def _advise() -> Any:
    """The call of the C library, or None where there is none like it."""
    try:
        found = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found if os.path.exists("/proc/self/pagemap") else None


_madvise = _advise()


def give_back(address: int, size: int) -> bool:
    """Let go of the pages at an address if each of them is as its file has it.

    A page that was written to since it was mapped is the process's own, and so is memory that
    belongs to no file: then nothing is let go. Returns whether pages were.
    """
    if _madvise is None or size < LEAST:
        return False
    first = address // mmap.PAGESIZE
    count = -(-(address + size) // mmap.PAGESIZE) - first
    if not _of_a_file(first, 1) or not _of_a_file(first, count):
        return False
    return bool(_madvise(first * mmap.PAGESIZE, count * mmap.PAGESIZE, _DONTNEED) == 0)


def _of_a_file(first: int, count: int) -> bool:
    """Whether all pages that are there are a file's, unchanged."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * count), dtype=np.uint64)
    except OSError:  # it may not be looked at here
        return False
    own = (entries & _SWAPPED != 0) | ((entries & _PRESENT != 0) & (entries & _OF_A_FILE == 0))
    return len(entries) == count and not own.any()
