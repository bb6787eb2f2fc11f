"""Check an ONNX artifact from its files: ONNX's own check, recorded results, parts of the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..errors import SpaError
from ..onnx_backend.biases import with_biases
from ..onnx_backend.read.file import OnnxFile, check_finite, open_model
from ..onnx_backend.run.session import results
from ..runtime.session import open_session, run_session
from ..sources.backends import backend_of
from ..store.folder import read_slices
from .check import Check
from .load import check_inputs, dense_source
from .onnx_files import full_check
from .torch_checks import identity, reproduced, tried


def checks(folder: Path, structure: dict[str, Any], model: nn.Module | OnnxFile | str | None = None
           ) -> Iterator[Check]:
    """Yield the checks of model.onnx; `model` may be the dense file, opened or by its name."""
    path = folder / "model.onnx"
    yield (first := tried("onnx", lambda: _checked(folder, path)))
    if first.passed:
        yield tried("reload", lambda: _results(folder, structure, path))
        yield tried("plan identity", lambda: _identity(folder, structure, path, model))


def _checked(folder: Path, path: Path) -> Check:
    full_check(path)
    check_finite(open_model(path), str(folder))
    return Check("onnx", True, "ONNX's full check passes")


def _results(folder: Path, structure: dict[str, Any], path: Path) -> Check:
    inputs: Any = check_inputs(folder, structure)
    got = _run(path, {n: t.numpy() for n, t in inputs.items()})
    return reproduced(folder, [torch.from_numpy(np.array(a)) for a in got])


def _run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Results of ONNX Runtime, or of ONNX's reference implementation where it refuses the file."""
    try:
        return run_session(open_session(path), feeds)
    except SpaError:
        return [np.asarray(a) for a in results(ir.load(path), feeds)[0]]


def _identity(folder: Path, structure: dict[str, Any], path: Path, model: object) -> Check:
    """Each initialiser is an exact index-select of the dense file's."""
    def solved(dense: OnnxFile) -> Iterator[tuple[Mapping[str, Any], Any, Mapping[str, str]]]:
        traced, solution = backend_of(dense).trace(dense, check_inputs(folder, structure))
        yield {}, solution, traced.tied

    def source() -> OnnxFile:
        dense = model if isinstance(model, OnnxFile) else dense_source(structure, model)
        if "biased" not in structure or dense.digest != structure["source_sha256"]:
            return dense
        traced, _ = backend_of(dense).trace(dense, check_inputs(folder, structure))
        return with_biases(traced, structure["biased"])

    made, slices = ir.load(path).graph.initializers, read_slices(folder)["arrays"]

    def have(dense: OnnxFile) -> dict[str, np.ndarray]:
        """Arrays that the dense file has too: floating ones, and others that were cut.

        Single numbers may have been re-written: the eps of a norm over fewer features.
        """
        found = _arrays({n: v for n, v in made.items() if n in dense.model.graph.initializers})
        return {n: a for n, a in found.items()
                if n in slices or (a.dtype.kind not in "iub" and a.size > 1)}

    return identity(folder, structure, have, source, lambda dense: dense.digest,
                    lambda dense: _arrays(dense.model.graph.initializers), solved)


def _arrays(values: Mapping[str, ir.Value]) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy() for n, v in values.items() if v.const_value is not None}
