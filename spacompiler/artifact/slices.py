"""Which indices of each stored array are kept: what makes a plan checkable from files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .. import recorded
from ..axes.choices import Choices, indices
from ..groups.solution import Solution
from ..plan.effects import norm_changes
from ..said import nameless
from ..stages.records import Job

def without_places(job: Job) -> Callable[[Any], Any]:
    """What takes the places of the user's files out of data: files keep their names."""
    r = job.recipe
    given = [job.name, r.calibration, r.recover_data, *(a.rpartition("=")[0] or a
                                                        for a in r.adapters), *r.adapters]
    passes = (r.importance, r.allocation, r.repair, r.recovery, r.schedule)
    given += [text.partition(":")[0] for text in (*passes, job.name)]
    return lambda data: nameless(data, given)


def plan_text(job: Job) -> str:
    """The plan as JSON, without places of the user's files."""
    return replace(job.plan, recipe=without_places(job)(job.plan.recipe)).to_json()


def slices(job: Job) -> dict[str, Any]:
    """Return, per stored array that changed, the kept indices of each dimension.

    Equal index lists are stored once; `null` keeps a whole dimension; arrays whose values were
    corrected besides (gains of RMSNorms) are listed with their factor, repaired and trained ones
    by name.
    `weights_hash` is that of the dense model, without the adapter if one was kept.
    """
    found = cuts(job.solution, job.choices, job.trace.tied)
    found["repaired"] = [name for name, first in job.trace.tied.items()
                         if first in job.trace.repaired]
    found["weights_hash"] = job.base_hash or job.plan.weights_hash
    if job.trained is not None:
        body = getattr(job.pruned, "body", job.pruned)
        found["trained"] = sorted(name for name, problem in recorded.parts(
            body.state_dict(), job.module.state_dict(), {**found, "repaired": ()}) if problem)
    return found


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
    for found in (arrays, gains, shapes):
        found |= {n: found[first] for n, first in tied.items() if first in found}
    return {"indices": {key: list(index) for index, key in lists.items()}, "arrays": arrays,
            "shapes": shapes, "corrected": gains}


def _shared(lists: dict[tuple[int, ...], str], index: np.ndarray) -> str:
    return lists.setdefault(tuple(index.tolist()), str(len(lists)))
