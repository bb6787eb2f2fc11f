"""Check an ONNX artifact from its files: ONNX's own check, recorded results, parts of the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import SpaError
from ..onnx_backend.read.file import OnnxFile, check_finite, open_model
from ..onnx_backend.run.session import results
from ..runtime.session import open_session, run_session
from ..store.arrays import load_weights, sample
from .check import TOLERANCE, Check
from .load import check_inputs
from .onnx_files import full_check


def checks(folder: Path, structure: dict[str, Any], model: Any = None) -> Iterator[Check]:
    """Yield the checks of model.onnx; `model` may be the dense file, opened."""
    path = folder / "model.onnx"
    try:
        full_check(path)
        check_finite(open_model(path), str(folder))
    except SpaError as problem:
        yield Check("onnx", False, problem.why)
        return
    yield Check("onnx", True, "ONNX's full check passes")
    yield _results(folder, structure, path)
    yield _identity(folder, structure, path, model)


def _results(folder: Path, structure: dict[str, Any], path: Path) -> Check:
    stored = load_weights(folder / "check.safetensors")
    inputs: Any = check_inputs(folder, structure)
    got = _run(path, {n: t.numpy() for n, t in inputs.items()})
    worst = 0.0
    for name, want in stored.items():
        if name.startswith("result."):
            have = sample(torch.from_numpy(got[int(name.removeprefix("result."))]))
            if have.shape != want.shape:
                return Check("reload", False, f"{name}: {have.shape} for {want.shape}")
            scale = max(want.abs().max().item(), 1e-30) if want.numel() else 1.0
            gap = (have - want).abs().max().item() if want.numel() else 0.0
            worst = max(worst, gap / scale)
    return Check("reload", worst <= TOLERANCE, f"recorded results reproduced to {worst:.1e}")


def _run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Results of ONNX Runtime, or of ONNX's reference implementation where it refuses the file."""
    try:
        return run_session(open_session(path), feeds)
    except SpaError:
        return [np.asarray(a) for a in results(ir.load(path), feeds)[0]]


def _identity(folder: Path, structure: dict[str, Any], path: Path, model: Any) -> Check:
    """Each initialiser is an exact index-select of the dense file's."""
    name = "plan identity"
    try:
        dense: OnnxFile = model if isinstance(model, OnnxFile) else open_model(structure["model"])
    except SpaError as problem:
        return Check(name, None, f"skipped: {problem.why or problem.what}")
    if dense.digest != structure["source_sha256"]:
        return Check(name, None, "skipped: the source is not the file that was pruned")
    slices = json.loads((folder / "slices.json").read_text(encoding="utf-8"))
    pruned, old = ir.load(path).graph.initializers, dense.model.graph.initializers
    count = 0
    for key, index in slices["arrays"].items():
        if key not in pruned or key not in old or index == "joint" or key in slices["corrected"]:
            continue
        count += 1
        want = _numpy(old[key])
        for dim, which in enumerate(index):
            if which is not None:
                want = np.take(want, slices["indices"][which], axis=dim)
        if not np.array_equal(want, _numpy(pruned[key])):
            return Check(name, False, f"{key} is not the recorded part of the dense array")
    return Check(name, True, f"{count} arrays are exact parts of the dense ones")


def _numpy(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()
