"""Memory that the C library keeps for itself after it was freed: given back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any


class _Info(ctypes.Structure):
    """What glibc's mallinfo2 tells of the heap, in bytes; `fordblks` are free."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost").split()]


def _heap() -> tuple[Callable[[int], Any], Callable[[], int]]:
    """What gives the heap's free bytes back, and what counts them."""
    try:
        library = ctypes.CDLL(None)
        info = library.mallinfo2
        info.restype = _Info
        return library.malloc_trim, lambda: int(info().fordblks)
    except (AttributeError, OSError, TypeError):  # not glibc, or an old one
        return lambda keep: None, lambda: 0


_trim, _free = _heap()
SPARE = 1 << 26
"""Bytes of the heap that may lie free: the next arrays take them, without asking the system."""


def give_back() -> None:
    """Let the system have what the heap holds free, if that is more than `SPARE`.

    Arrays that are freed leave holes between those still held; glibc seldom fits the next aligned
    array into them, so that the heap of a long job grows while no more is held than before.
    """
    if _free() > SPARE:
        _trim(0)
