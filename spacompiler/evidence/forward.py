"""What is said where a criterion wants gradients of a network that is computed forward only."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint

from ..errors import UsageError
from ..request.registry import available
from .statistics import forward_only


def no_gradients(wanted: Iterable[str]) -> UsageError:
    """Return the error, with the criteria that need none."""
    names = [e.name for k, e in available() if k == "importance" and _is_forward(e)]
    return UsageError(
        "an ONNX file has no gradients" + (
            f": {', '.join(sorted(wanted))} cannot be gathered" if wanted else ""),
        why="ONNX Runtime computes forward only",
        fix=f"use --importance with one that needs none: {', '.join(sorted(names))}")


def _is_forward(entry: EntryPoint) -> bool:
    """True for an installed criterion that needs no gradients."""
    try:
        return forward_only(entry.load()().needs)
    except (ImportError, AttributeError, TypeError):
        return False
