"""Write a finished job: weights, config, ONNX, plan, report, manifest; and check the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..axes.choices import indices
from ..plan.effects import norm_changes
from ..plan.plan import pruned_bytes
from ..stages.records import Job
from ..store import folder as artifact
from . import report


def write(job: Job, out: Path) -> dict[str, Any]:
    """Write the artifact of a job to a new directory and return the report's data.

    Raises SpaError, leaving nothing behind, if any file cannot be written or a check fails.
    """
    data = report.facts(job)
    data["bytes"] = pruned_bytes(job.solution, job.choices)
    data["bytes"]["dense"] = job.whole.get("bytes", data["bytes"]["dense"])
    with artifact.whole(out) as folder:
        job.progress("writing weights", 0, 4)
        job.backend.write(job, folder, data)
        if job.recipe.int8:
            from .deployed import write_int8

            data.update(write_int8(job, folder))
        job.progress("writing the report", 3, 4)
        (folder / "plan.json").write_text(job.plan.to_json(), encoding="utf-8")
        artifact.write_json(folder / "slices.json", slices(job))
        if job.kept is not None:
            job.kept.save(folder / "adapter")
        artifact.write_json(folder / "recipe.json", {
            "model": job.name, **job.recipe.as_dict(), "importance": repr(job.importance),
            "allocation": repr(job.allocation),
            "repair": "none" if job.compensation is None else repr(job.compensation),
            "calibration": job.calibration.origin})
        artifact.write_json(folder / "report.json", data)
        (folder / "report.md").write_text(report.markdown(data), encoding="utf-8")
        artifact.write_manifest(folder)
    return data


def slices(job: Job) -> dict[str, Any]:
    """Return, per stored array that changed, the kept indices of each dimension.

    Equal index lists are stored once; `null` keeps a whole dimension; arrays whose values were
    corrected besides (gains of RMSNorms) are listed with their factor, repaired ones by name.
    `weights_hash` is that of the dense model, without the adapter if one was kept.
    """
    lists: dict[tuple[int, ...], str] = {}
    arrays: dict[str, Any] = {}
    for name, dims in job.solution.weights().items():
        per_axis = indices(dims, job.choices)
        if per_axis is None:
            arrays[name] = "joint"
        elif any(index is not None for index in per_axis):
            arrays[name] = [None if i is None else _shared(lists, i) for i in per_axis]
    gains = {c.norm.gain: {"factor": c.gain, "offset": c.norm.offset}
             for c in norm_changes(job.solution, job.choices)}
    shapes = {n: [e.size for e in dims] for n, dims in job.solution.weights().items()
              if n in arrays}
    repaired = [name for name, first in job.trace.tied.items() if first in job.trace.repaired]
    return {"indices": {key: list(index) for index, key in lists.items()}, "arrays": arrays,
            "shapes": shapes, "corrected": gains, "repaired": repaired,
            "weights_hash": job.base_hash or job.plan.weights_hash}


def _shared(lists: dict[tuple[int, ...], str], index: np.ndarray) -> str:
    return lists.setdefault(tuple(index.tolist()), str(len(lists)))


# --- ONNX -------------------------------------------------------------------------------------


