"""Sessions of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..errors import SpaError

Arrays = Mapping[str, np.ndarray]


PLACES = ("model.onnx", "onnx/model.onnx")
"""Where in a directory a runtime looks for the model."""


def model_file(path: Path) -> Path:
    """Return the ONNX file that a directory holds, or would hold; a file is itself."""
    if not path.is_dir():
        return path
    return next((path / name for name in PLACES if (path / name).exists()), path / PLACES[0])


def open_session(path: Path, *, threads: int = 1) -> ort.InferenceSession:
    """Open a model for the CPU at one fixed optimisation level, so that results compare.

    Spinning is off: idle threads that spin would count as CPU time.

    Raises:
        SpaError: the file is missing, or ONNX Runtime does not accept it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SpaError(
            what="ONNX Runtime cannot open the model",
            where=str(path),
            why=str(error),
            fix="check that the file and its .data file are complete and stand side by side",
        ) from error


def run_session(session: ort.InferenceSession, inputs: Arrays) -> list[np.ndarray]:
    """Run one forward pass; the outputs come in the order of the graph's outputs.

    Raises:
        SpaError: the inputs' names, types or shapes do not fit, or a kernel fails.
    """
    try:
        return session.run(None, dict(inputs))
    except Exception as error:
        wanted = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in session.get_inputs())
        given = ", ".join(f"{k}: {v.dtype} {list(v.shape)}" for k, v in inputs.items())
        raise SpaError(
            what="the ONNX model does not run on these inputs",
            why=f"it takes ({wanted}) and was given ({given}): {error}",
            fix="pass one array for every graph input, of its type and fixed sizes",
        ) from error
