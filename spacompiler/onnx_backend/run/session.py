"""Run a model in ONNX Runtime from memory: weights are lent, not copied into a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from ...errors import SpaError
from ...system.staging import Scratch, told
from ..read.skeleton import external, skeleton
from . import double as onnx_double

LENT_BYTES = 2**28
"""Above this, initialisers in memory go by way of a temporary file."""


def _loose_bytes(model: ir.Model) -> int:
    """Bytes of the initialisers that lie in memory or are made when they are read."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values()
               if v.const_value is not None and not isinstance(v.const_value, ir.ExternalTensor))


class Session:
    """A model opened in ONNX Runtime; `extra` values are returned besides its outputs.

    Raises SpaError if ONNX Runtime does not accept it.
    """

    def __init__(self, model: ir.Model, extra: Sequence[str] = (), *, fuse: bool = False) -> None:
        self._folder = Scratch() if _loose_bytes(model) > LENT_BYTES else None
        if self._folder is not None:  # ONNX Runtime copies what it is lent, and maps files
            path = self._folder.path / "model.onnx"
            with told("a temporary file", path):
                ir.save(model, path, external_data="model.onnx.data")
            model = ir.load(path)
        proto = skeleton(model, mapped=True)
        have = {o.name for o in proto.graph.output}
        proto.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(n) for n in extra if n not in have)
        self._arrays = {n: np.ascontiguousarray(a) for n, a in external(model).items()}
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if fuse else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # it costs long graphs, and pays where one runs often
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")
        self._lent = [ort.OrtValue.ortvalue_from_numpy(a) for a in self._arrays.values()]
        if self._lent:
            options.add_external_initializers(list(self._arrays), self._lent)
        place = next((str(v.const_value.base_dir) for v in model.graph.initializers.values()
                      if isinstance(v.const_value, ir.ExternalTensor)), None)
        if place is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", place or ".")
        try:
            self._session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # ONNX Runtime raises its own kinds
            raise _refused("ONNX Runtime does not accept the model", problem) from problem

    def run(self, feeds: Mapping[str, np.ndarray],
            names: Sequence[str] | None = None) -> list[Any]:
        """Return the named values (by default all outputs) for these inputs."""
        wanted = {i.name for i in self._session.get_inputs()}
        try:
            return list(self._session.run(
                list(names) if names is not None else None,
                {n: a for n, a in feeds.items() if n in wanted}))
        except Exception as problem:
            raise _refused("ONNX Runtime cannot run the model", problem) from problem


def _refused(what: str, problem: Exception) -> SpaError:
    reason = re.sub(r"/\S+:\d+ \S.*?\) ", "", str(problem).strip().splitlines()[0])[:400]
    return SpaError(what, why=reason,
                    fix="the example inputs may not fit (--calibration inputs.npz), or this "
                        "version of ONNX Runtime lacks an operator")


def hidden(name: str) -> SpaError:
    """Return the error for a value that no run returns."""
    return SpaError(
        f"{name!r} cannot be observed", why="it is made inside a branch, and ONNX Runtime returns "
        "values of the whole graph alone",
        fix="use --importance magnitude and --repair none, or --ignore the groups that are read "
            "from it")


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """Run a model once and return the named values."""
    return dict(zip(names, Session(model, names).run(feeds, names), strict=True))


def alone(model: ir.Model, value: ir.Value) -> ir.Model:
    """Return a model of the nodes that make a value from stored arrays, and nothing else."""
    nodes: dict[ir.Node, None] = {}
    stored: dict[ir.Value, None] = {}
    waiting = [value]
    while waiting:
        found = waiting.pop()
        maker = found.producer()
        if maker is None:
            stored[found] = None
            continue
        ahead = [v for v in maker.inputs if v is not None and v.producer() not in nodes]
        if any(v.producer() is not None for v in ahead):
            waiting += [found, *ahead]
        else:
            stored.update(dict.fromkeys(v for v in maker.inputs if v is not None and
                                        v.producer() is None))
            nodes[maker] = None
    view = ir.GraphView([], [value], nodes=[*nodes], initializers=[*stored],
                        opset_imports=model.graph.opset_imports, name="alone")
    return ir.Model(view.clone(), ir_version=model.ir_version)


def results(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> tuple[list[Any], str]:
    """Return a model's results, and "" or why ONNX's reference implementation computed them.

    Raises SpaError if neither it nor ONNX Runtime can.
    """
    try:
        return Session(model).run(feeds), ""
    except SpaError as problem:
        try:
            found = onnx_double.evaluate(model, feeds)
        except Exception:  # the reference implementation refuses in many ways
            raise problem from None
        return found, f"ONNX Runtime {ort.__version__} does not run the model ({problem.why})"
