"""Write a finished job: weights, config, ONNX, plan, report, card, manifest; check the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plan.plan import pruned_bytes
from ..request import recipe_file
from ..stages.compiled import Compiled
from ..store.folder import whole, write_json, write_manifest
from . import report
from .card import card
from .onnx_files import write_file
from .page import page
from .slices import plan_text, slices, without_places
from .torch_files import write_module

FILES = {"torch": write_module, "onnx": write_file}
"""What writes the files of a model, by the kind of its backend."""

NAMING = ("model", "importance", "allocation", "repair", "calibration", "recovery", "notes", "int8")
"""Entries of the report that may name files of the user's."""


def write(job: Compiled, out: Path) -> dict[str, Any]:
    """Write the artifact of a job to a new directory and return the report's data.

    Raises SpaError, leaving nothing behind, if any file cannot be written or a check fails.
    """
    data = report.facts(job)
    data["bytes"] = pruned_bytes(job.solution, job.choices)
    data["bytes"]["dense"] = job.whole.get("bytes", data["bytes"]["dense"])
    local = without_places(job)
    with whole(out) as folder:
        job.progress("writing weights", 0, 4)
        FILES[job.backend.kind](job, folder, data)
        if job.recipe.int8:
            from .deployed import write_int8

            data.update(write_int8(job, folder))
        job.progress("writing the report", 3, 4)
        (folder / "plan.json").write_text(plan_text(job), encoding="utf-8")
        write_json(folder / "slices.json", slices(job))
        if job.kept is not None:
            job.kept.save(folder / "adapter")
        _write_recipe(job, folder)
        data.update(local({k: data[k] for k in NAMING if k in data}))
        write_json(folder / "report.json", data)
        for name, text in {"report.md": report.markdown(data), "report.html": page(data),
                           "README.md": card(data, _base(job))}.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_manifest(folder)
    return data


def _base(job: Compiled) -> str:
    """What a hub finds the dense model by, or ""."""
    return job.name if job.source.get("kind") == "hub" else ""


def _write_recipe(job: Compiled, folder: Path) -> None:
    """Write the recipe as it was carried out, for programs and for people."""
    asked = job.recipe
    kind = type(asked)
    made = kind(**without_places(job)({
        **job.plan.recipe, "onnx": asked.onnx, "latency": asked.latency}))
    write_json(folder / "recipe.json", {**made.as_dict(), "model": made.model or job.name})
    (folder / "recipe.yaml").write_text(recipe_file.text(made, whole=True), encoding="utf-8")
