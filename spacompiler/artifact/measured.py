"""Measurements beside an artifact: it is whole without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ..stages.compiled import Compiled

T = TypeVar("T")


def measured(job: Compiled, what: str, run: Callable[[], T]) -> T | None:
    """Return a measurement; None, and a note with the reason, where it fails."""
    try:
        return run()
    except Exception as problem:  # kernels, sizes and memory of this machine
        why = f"{type(problem).__name__}: {problem}".splitlines()[0]
        job.notes.append(f"{what} could not be measured: {why}")
        return None
