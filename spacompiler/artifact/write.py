"""Write a finished job: weights, config, ONNX, plan, report, manifest; and check the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import recorded
from ..axes.choices import Choices, indices
from ..groups.solution import Solution
from ..plan.effects import norm_changes
from ..plan.plan import pruned_bytes
from ..said import nameless, said
from ..stages.records import Job
from ..store import folder as artifact
from . import report

NAMING = ("model", "importance", "allocation", "repair", "calibration", "recovery", "notes", "int8")
"""Entries of the report that may name files of the user's."""


def write(job: Job, out: Path) -> dict[str, Any]:
    """Write the artifact of a job to a new directory and return the report's data.

    Raises SpaError, leaving nothing behind, if any file cannot be written or a check fails.
    """
    data = report.facts(job)
    data["bytes"] = pruned_bytes(job.solution, job.choices)
    data["bytes"]["dense"] = job.whole.get("bytes", data["bytes"]["dense"])
    local = _local(job)
    with artifact.whole(out) as folder:
        job.progress("writing weights", 0, 4)
        job.backend.write(job, folder, data)
        if job.recipe.int8:
            from .deployed import write_int8

            data.update(write_int8(job, folder))
        job.progress("writing the report", 3, 4)
        (folder / "plan.json").write_text(_plan(job), encoding="utf-8")
        artifact.write_json(folder / "slices.json", slices(job))
        if job.kept is not None:
            job.kept.save(folder / "adapter")
        artifact.write_json(folder / "recipe.json", local({
            "model": job.name, **job.recipe.as_dict(), "importance": said(job.importance),
            "allocation": said(job.allocation),
            "repair": "none" if job.compensation is None else said(job.compensation),
            "calibration": job.calibration.origin}))
        data.update(local({k: data[k] for k in NAMING if k in data}))
        artifact.write_json(folder / "report.json", data)
        (folder / "report.md").write_text(report.markdown(data), encoding="utf-8")
        artifact.write_manifest(folder)
    return data


def _local(job: Job) -> Callable[[Any], Any]:
    """What takes the places of the user's files out of data: files keep their names."""
    r = job.recipe
    given = [job.name, r.calibration, r.recover_data, *(a.rpartition("=")[0] or a
                                                        for a in r.adapters), *r.adapters]
    passes = (r.importance, r.allocation, r.repair, r.recovery, r.schedule)
    given += [text.partition(":")[0] for text in (*passes, job.name)]
    return lambda data: nameless(data, given)


def _plan(job: Job) -> str:
    return replace(job.plan, recipe=_local(job)(job.plan.recipe)).to_json()


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


# --- ONNX -------------------------------------------------------------------------------------


