"""What a plan does to stored arrays, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..axes.choices import Choices, indices
from ..groups.solution import Solution
from ..plan.effects import norm_changes
from ..plan.terms import terms


def cuts(solution: Solution, choices: Choices, tied: Mapping[str, str]) -> dict[str, Any]:
    """Return what a plan does to stored arrays: kept indices, dense shapes, factors of gains.

    Arrays under several names (`tied` gives the first of each) are listed under all of them.
    """
    lists: dict[tuple[int, ...], str] = {}
    arrays: dict[str, Any] = {}
    for name, dims in solution.weights().items():
        per_axis = indices(dims, choices)
        if per_axis is None:
            arrays[name] = "joint"
        elif any(index is not None for index in per_axis):
            arrays[name] = [None if i is None else _shared(lists, i) for i in per_axis]
    gains = {c.norm.gain: {"factor": c.gain, "offset": c.norm.offset}
             for c in norm_changes(solution, choices)}
    shapes = {n: [e.size for e in dims] for n, dims in solution.weights().items() if n in arrays}
    _terms(solution, arrays)
    for found in (arrays, gains, shapes):
        found |= {n: found[first] for n, first in tied.items() if first in found}
    return {"indices": {key: list(index) for index, key in lists.items()}, "arrays": arrays,
            "shapes": shapes, "corrected": gains}


def _terms(solution: Solution, arrays: dict[str, Any]) -> None:
    """List the arrays that a module computes cut weights from: one is cut as the weight is, the
    others follow from the cut."""
    for name, names in solution.graph.sources.items():
        called, _ = terms(names)
        if name in arrays and called:
            arrays[called.pop("v")] = arrays[name]
            arrays.update((other, "joint") for other in called.values())


def _shared(lists: dict[tuple[int, ...], str], index: np.ndarray) -> str:
    return lists.setdefault(tuple(index.tolist()), str(len(lists)))
