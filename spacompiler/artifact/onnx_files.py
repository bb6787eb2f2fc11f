"""Write a pruned ONNX file, and check the file as it lies there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import ProofError, SpaError
from ..groups.solution import solve
from ..onnx_backend import prove as onnx_proof
from ..onnx_backend.emit import rewrite
from ..onnx_backend.prove import as_tensors
from ..onnx_backend.read import valid as onnx_valid
from ..onnx_backend.read.examples import example, sizes
from ..onnx_backend.read.file import OnnxFile
from ..onnx_backend.read.lower import trace
from ..onnx_backend.read.trace import OnnxTrace
from ..onnx_backend.run.session import results
from ..onnx_backend.save import save
from ..rows.onnx_table import OPS, TABLE
from ..runtime.latency import compare_latency
from ..runtime.session import open_session, run_session
from ..stages.compiled import Compiled
from ..stages.proof import relative_error
from ..stages.tolerances import RELOAD_FILE
from ..store import beside
from ..store.arrays import save_check
from ..store.folder import write_json
from .measured import measured

LATENCY_BYTES = 2**29


def write_file(job: Compiled, folder: Path, data: dict[str, Any]) -> None:
    """Write model.onnx, structure.json and check.safetensors into an artifact's folder.

    Raises ProofError if the file does not pass ONNX's full check or gives other results.
    """
    traced: OnnxTrace = job.trace  # type: ignore[assignment]
    path = folder / "model.onnx"
    size = save(job.pruned, path)
    full_check(path)
    job.progress("checking the file", 1, 4)
    want, refused = results(job.pruned, traced.feeds)
    again, _ = results(ir.load(path), traced.feeds)
    error = relative_error(as_tensors(again), as_tensors(want))
    got = again if refused else run_session(open_session(path), traced.feeds)
    if not error <= RELOAD_FILE.value:
        raise ProofError("the written file differs from the model in memory",
                         why=f"relative error {error:.1e}",
                         fix="please report it")
    data["reload"] = f"the file's results are those of the model in memory to {error:.1e}"
    data["onnx"] = elsewhere(job)
    data["files"] = _beside(job, Path(traced.file.path).parent, folder)
    save_check(folder / "check.safetensors", (), {
        n: torch.from_numpy(np.array(a)) for n, a in traced.feeds.items()},
        [torch.from_numpy(np.array(a)) for a in got])
    write_json(folder / "structure.json", structure(job, traced))
    data["latency"] = None
    if refused:
        job.notes.append(f"{refused}: checked by ONNX's reference implementation, not timed")
    if job.recipe.latency and not refused and size <= LATENCY_BYTES:
        job.progress("measuring latency", 2, 4)
        data["latency"] = measured(job, "latency", lambda: _latency(traced, path))


def _beside(job: Compiled, source: Path, folder: Path) -> dict[str, Any]:
    found = beside.carry_known(source, folder)
    if sized := [name for name in found.carried if name in beside.SIZED]:
        job.notes.append(f"{', '.join(sized)} went along as it lay beside the file: sizes of "
                         "layers in it are those of the dense model")
    return found.as_dict()


def full_check(path: Path) -> None:
    """Raise ProofError unless ONNX's checker, shape inference included, accepts a file."""
    try:
        onnx_valid.full_check(path, OPS)
    except Exception as problem:
        raise ProofError("the written file fails ONNX's full check",
                         why=str(problem).strip().splitlines()[0][:300],
                         fix="please report it") from problem


def structure(job: Compiled, traced: OnnxTrace) -> dict[str, Any]:
    """Return what a loader needs beside the file."""
    file: OnnxFile = traced.file
    return {"layout": "onnx", "emission": "graph", "model": Path(job.name).name, "class": "",
            "source": {"kind": job.source.get("kind", "onnx")},
            "attributes": [], "source_sha256": file.digest,
            "opset": dict(file.model.opset_imports),
            "inputs": {"args": 0, "kwargs": list(traced.feeds), "constants": {}},
            **({"biased": list(file.biased)} if file.biased else {})}


def other_sizes(traced: OnnxTrace) -> dict[str, tuple[int, ...]] | None:
    """Return input sizes that differ from the traced ones in every varying dimension."""
    tensors = traced.graph.tensors

    def pick(value: ir.Value, d: int) -> int:
        shape = tensors[value.name or ""].shape
        return shape[d] + (1 if d == 0 else 32 if len(shape) >= 4 else 1)

    varies = any(tensors[n].dynamic for n in traced.graph.inputs)
    return sizes(traced.file, pick) if varies else None


def elsewhere(job: Compiled) -> list[dict[str, Any]]:
    """Compare the pruned model with the masked dense one at other sizes, solved anew for them."""
    traced: OnnxTrace = job.trace  # type: ignore[assignment]
    found = other_sizes(traced)
    if found is None:
        return []
    try:
        feeds = example(traced.file, found, seed=1)
        other = trace(traced.file, feeds)
        other.repaired = traced.repaired
        solution = solve(other.graph, TABLE)
        precision, tolerance, error = onnx_proof.elsewhere(
            other, solution, job.plan.choices(solution),
            lambda double: rewrite(traced, job.solution, job.choices, double=double))
    except SpaError as problem:
        job.notes.append(f"not checked at other sizes than the traced ones: {problem.what}")
        return []
    if not error <= tolerance:
        raise ProofError("the pruned model is not the masked dense model at other sizes",
                         where=str(found), why=f"relative error {error:.1e} in {precision}",
                         fix="please report it")
    return [{"shapes": {n: list(s) for n, s in found.items()}, "max_abs": error,
             "max_rel": error}]


def _latency(traced: OnnxTrace, path: Path) -> dict[str, Any]:
    feeds: Mapping[str, np.ndarray] = traced.feeds
    times = compare_latency({"dense": traced.file.path, "pruned": path}, feeds)
    return {**{n: {"median_ms": t.median, "best_ms": t.best, "cpu_median_ms": t.cpu_median}
               for n, t in times.items()}, "threads": 1,
            "shapes": {n: list(a.shape) for n, a in feeds.items()}}
