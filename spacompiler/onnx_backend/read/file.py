"""An ONNX file as a model: read and checked, never trusted, weights left where they are.

The file's graph, with functions inlined and Constant nodes made initialisers, stays the truth
that the emitter rewrites; `lower` makes the IR of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort

from ...errors import SpaError, UsageError, WeightsError
from ...rows.onnx_table import OPS
from .shapes import sizes_of
from .skeleton import skeleton
from .stored import check_tensor, external_files, graphs, release, take_in, tensors
from .valid import check, runtime_ir

UNIFORM = 2**16
"""Arrays of up to so many equal numbers are not shared between their readers."""


@dataclass(eq=False)
class OnnxFile:
    """A checked model and where it came from; `notes` say what was changed on reading.

    `data` are the files beside it that hold arrays, `biased` the operators (by their names in the
    IR) that have been given a bias of zeros.
    """

    path: Path
    model: ir.Model
    data: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)
    biased: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """sha256 over the file and, in order of name, its external data files."""
        found = hashlib.sha256()
        for place in [self.path, *self.data]:
            with place.open("rb") as file:
                while chunk := file.read(1 << 20):
                    found.update(chunk)
        return found.hexdigest()

    def inputs(self) -> list[ir.Value]:
        """Return what a caller feeds (initialisers that are listed as inputs are no inputs)."""
        return [v for v in self.model.graph.inputs if v.name not in self.model.graph.initializers]


def open_model(path: str | Path) -> OnnxFile:
    """Read an ONNX file; external data must lie in the file's own folder.

    Raises SpaError for anything that is no valid model.
    """
    place = Path(path)
    if not place.is_file():
        raise SpaError(f"there is no model at {str(path)!r}", why="no such file",
                       fix="give an .onnx file")
    try:
        model = ir.load(place)
        for tensor in tensors(model):
            check_tensor(tensor, place)
        made = OnnxFile(place, model, tuple(sorted(external_files(model))))
        take_in(model)
        _check_model(made)
        _prepare(made)
    except SpaError:
        raise
    except Exception as problem:  # protobuf and onnx_ir raise many kinds
        raise _unreadable(place, problem) from problem
    return made


def _unreadable(place: Path, problem: Exception) -> SpaError:
    reason = str(problem).strip().splitlines()
    return SpaError(f"{place.name} cannot be read as ONNX", where=str(place),
                    why=(reason[0] if reason else type(problem).__name__)[:300],
                    fix="the file is damaged or no ONNX model; export it again")


def _check_model(file: OnnxFile) -> None:
    model, where = file.model, str(file.path)
    version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
    newest = onnx.defs.onnx_opset_version()
    if version > newest:
        raise SpaError(f"{file.path.name} needs opset {version}", where=where,
                       why=f"the installed onnx package knows opsets up to {newest}",
                       fix="upgrade onnx, or export with an older opset")
    if version == 0:
        raise SpaError(f"{file.path.name} holds no network", where=where,
                       why="it imports no ONNX operators",
                       fix="give a model of ONNX's standard operators")
    try:
        check(skeleton(model, as_inputs=True), OPS)
    except Exception as problem:
        raise SpaError(f"{file.path.name} is no valid ONNX model", where=where,
                       why=str(problem).strip().splitlines()[0][:300],
                       fix="export it again") from problem
    for value in file.inputs():
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            raise SpaError(f"input {value.name!r} is no tensor of known rank", where=where,
                           fix="only tensors are understood as inputs")


def check_finite(file: OnnxFile, where: str) -> None:
    """Raise WeightsError if a stored array holds NaN or infinity, but for masks and bounds."""
    for name, value in file.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not _sound(tensor.numpy()):
            raise WeightsError(f"weight {name} holds NaN or infinity", where=where,
                           fix="use a model with finite weights")
        release(file.model, name)


def _sound(array: np.ndarray) -> bool:
    """True if all is finite, or nothing but zeros and infinities (a mask, a bound)."""
    array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    finite = np.isfinite(array)
    return bool(finite.all() or (not np.isnan(array).any() and not array[finite].any()))


def _prepare(file: OnnxFile) -> None:
    """Inline functions and turn Constant nodes into initialisers of the same names."""
    model = file.model
    _lower_ir(file)
    if model.functions:
        passes.InlinePass()(model)
    if any(n.op_type == "Constant" for n in model.graph.all_nodes()):
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        if model.ir_version < 4:
            model.ir_version = 4
            file.notes.append("IR version 4 instead of 3: stored constants need not be inputs")
    _lift_from_branches(model)
    passes.TopologicalSortPass()(model)
    _forget_shapes(model)
    _unshare(model)


def _lift_from_branches(model: ir.Model) -> None:
    """Store arrays of branches and bodies with the others, under names that nothing else has."""
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    stored = model.graph.initializers
    taken = {out.name for node in model.graph.all_nodes() for out in node.outputs}
    for name in [name for name in stored if name in taken]:
        value, count = stored.pop(name), 2
        while f"{name}_{count}" in taken or f"{name}_{count}" in stored:
            count += 1
        value.name = f"{name}_{count}"
        model.graph.register_initializer(value)


def _lower_ir(file: OnnxFile) -> None:
    """Let ONNX Runtime read a file that says no more than older IR versions can."""
    have = file.model.ir_version
    if have > 10 and have > runtime_ir():
        file.model.ir_version = runtime_ir()
        file.notes.append(f"IR version {file.model.ir_version} instead of {have}: ONNX Runtime "
                          f"{ort.__version__} reads no newer one")


def _forget_shapes(model: ir.Model) -> None:
    """Drop what the file says about values inside: stale shapes would stand beside new ones."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = ir.Shape(sizes_of(value.const_value))
                value.type = ir.TensorType(value.const_value.dtype)
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape, value.type = None, None


def _unshare(model: ir.Model) -> None:
    """Give each reader of a uniform array (zeros for a bias that there is not) its own.

    Exporters write equal constants once; what reads them is not tied together by that.
    """
    for name, value in list(model.graph.initializers.items()):
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or len(uses) < 2 or not 1 < tensor.size <= UNIFORM or \
                not tensor.dtype.is_floating_point() or value.is_graph_output():
            continue
        array = tensor.numpy()
        if (array != array.reshape(-1)[0]).any():
            continue
        for k, (node, index) in enumerate(uses[1:], start=2):
            copy = ir.Value(name=f"{name}_{k}", shape=value.shape, type=value.type,
                            const_value=ir.Tensor(array, dtype=tensor.dtype, name=f"{name}_{k}"))
            if copy.name in model.graph.initializers:
                return
            model.graph.register_initializer(copy)
            node.replace_input_with(index, copy)


def checked_feed(file: OnnxFile, given: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Return a user's inputs as arrays of the right types.

    Raises UsageError for names, types or shapes that the file does not have.
    """
    wanted = {v.name or "": v for v in file.inputs()}
    if set(given) != set(wanted):
        raise UsageError("the inputs do not fit the model",
                         why=f"given {sorted(given)}, the model has {sorted(wanted)}",
                         fix="name the arrays as the model's inputs")
    made = {}
    for name, value in wanted.items():
        array = np.asarray(given[name]).astype((value.dtype or ir.DataType.FLOAT).numpy())
        fixed = [n if isinstance(n, int) and n > 0 else None for n in value.shape or ()]
        if array.ndim != len(fixed) or any(
                n not in (None, m) for n, m in zip(fixed, array.shape, strict=True)):
            raise UsageError(f"input {name!r} does not fit the model",
                             why=f"its shape is {list(array.shape)}, the model has {value.shape}",
                             fix="give an array of that shape")
        made[name] = array
    return made
