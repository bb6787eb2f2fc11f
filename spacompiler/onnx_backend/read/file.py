"""An ONNX file as a model: read and checked, never trusted, weights left where they are.

The file's graph, with functions inlined and Constant nodes made initialisers, stays the truth
that the emitter rewrites; `onnx_lower` makes the IR of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import onnxruntime as ort

from ...errors import SpaError, UsageError, WeightsError
from ...rows.onnx_table import OPS
from . import valid as onnx_valid
from .shapes import LIMIT, sizes_of

INLINE = 4096
"""Initialisers above this many bytes stay out of the protobufs that are made of a model."""
UNIFORM = 2**16
_PLAIN = frozenset(ir.DataType[n] for n in (
    "FLOAT DOUBLE FLOAT16 INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 BOOL").split())


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
        for tensor in _tensors(model):
            _check_tensor(tensor, place)
        made = OnnxFile(place, model, tuple(sorted(_external_files(model))))
        _take_in(model)
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


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()
            elif attribute.type == ir.AttributeType.GRAPHS:
                yield from attribute.as_graphs()


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every stored tensor: initialisers and attributes, of functions and bodies too."""
    for graph in _graphs(model):
        yield from (v.const_value for v in graph.initializers.values() if v.const_value)
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node, those of bodies and functions too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _external_files(model: ir.Model) -> set[Path]:
    return {Path(t.path) for t in _tensors(model) if isinstance(t, ir.ExternalTensor)}


def _take_in(model: ir.Model) -> None:
    """Hold small external arrays, and those inside of nodes, in memory.

    ONNX's checker looks for them in the current folder when it is given no file.
    """
    for graph in _graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (
                    tensor.nbytes <= INLINE or graph is not model.graph):
                value.const_value = _held(tensor)
    for node in _nodes(model):
        for name, attribute in list(node.attributes.items()):
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR \
                    and isinstance(attribute.as_tensor(), ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _held(attribute.as_tensor()))


def _held(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def _check_tensor(tensor: ir.TensorProtocol, place: Path) -> None:
    """Refuse absurd sizes and external data outside the model's folder, before any is read."""
    shape = sizes_of(tensor)
    if any(n < 0 for n in shape) or np.prod(shape, dtype=float) > LIMIT:
        raise SpaError(f"stored tensor {tensor.name!r} has the absurd shape {list(shape)}",
                       where=str(place), fix="the file is damaged; export it again")
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise SpaError(f"stored tensor {tensor.name!r} cannot be read", where=str(place),
                       why="its numbers have no type (0)",
                       fix="the file is damaged; export it again")
    if isinstance(tensor, ir.ExternalTensor):
        try:
            _check_external(tensor, place)
        except OSError as problem:
            raise SpaError("the place of external data cannot be looked up", where=str(place),
                           why=f"tensor {tensor.name!r} is said to be stored in "
                               f"{_short(str(tensor.location))}: {problem.strerror}",
                           fix="the file is damaged; export it again") from problem
    else:
        _check_bytes(tensor, place)


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else f"{name[:60]}...{name[-10:]}")


def _check_external(tensor: ir.ExternalTensor, place: Path) -> None:
    folder, name = place.parent.resolve(), str(tensor.location)
    data = place.parent / name.replace("\0", "?")
    if "\0" in name or Path(name).is_absolute() or not data.resolve().is_relative_to(folder):
        raise SpaError(f"stored tensor {tensor.name!r} lies outside the model's folder",
                       where=str(place), why=f"its external data is {_short(name)}",
                       fix="keep external data beside the model")
    if not data.is_file():
        raise SpaError(f"the external data {_short(name)} is missing", where=str(place),
                       why=f"tensor {tensor.name!r} is stored there",
                       fix="put the data file beside the model")
    size, offset = data.stat().st_size, tensor.offset or 0
    if offset < 0 or offset + (tensor.length or tensor.nbytes) > size:
        raise SpaError(f"the external data {_short(name)} is too short", where=str(place),
                       why=f"tensor {tensor.name!r} would end beyond its {size} bytes",
                       fix="the file is damaged; copy or export it again")
    if tensor.length is not None and tensor.length < tensor.nbytes:
        raise SpaError(f"stored tensor {tensor.name!r} is too short", where=str(place),
                       why=f"{tensor.length} bytes for the shape {list(sizes_of(tensor))}",
                       fix="the file is damaged; export it again")


def _check_bytes(tensor: ir.TensorProtocol, place: Path) -> None:
    """Raise SpaError unless a tensor inside the file holds as many numbers as its shape says."""
    try:
        right = tensor.numpy().shape == sizes_of(tensor)
    except Exception:  # onnx_ir, numpy and protobuf raise many kinds
        right = False
    if not right:
        raise SpaError(f"stored tensor {tensor.name!r} cannot be read", where=str(place),
                       why=f"its bytes are not a {tensor.dtype} array of shape "
                           f"{list(sizes_of(tensor))}",
                       fix="the file is damaged; export it again")


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
        onnx_valid.check(skeleton(model, as_inputs=True), OPS)
    except Exception as problem:
        raise SpaError(f"{file.path.name} is no valid ONNX model", where=where,
                       why=str(problem).strip().splitlines()[0][:300],
                       fix="export it again") from problem
    for value in file.inputs():
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            raise SpaError(f"input {value.name!r} is no tensor of known rank", where=where,
                           fix="only tensors are understood as inputs")


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
    passes.TopologicalSortPass()(model)
    _forget_shapes(model)
    _unshare(model)


def _lower_ir(file: OnnxFile) -> None:
    """Let ONNX Runtime read a file that says no more than older IR versions can."""
    have = file.model.ir_version
    if have > 10 and have > onnx_valid.runtime_ir():
        file.model.ir_version = onnx_valid.runtime_ir()
        file.notes.append(f"IR version {file.model.ir_version} instead of {have}: ONNX Runtime "
                          f"{ort.__version__} reads no newer one")


def _forget_shapes(model: ir.Model) -> None:
    """Drop what the file says about values inside: stale shapes would stand beside new ones."""
    for graph in _graphs(model):
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


def skeleton(model: ir.Model, *, as_inputs: bool = False,
             mapped: bool = False) -> onnx.ModelProto:
    """Return the model as protobuf without its large initialisers.

    They become external (fed to ONNX Runtime from memory), or inputs where only the graph counts.
    With `mapped`, those that lie in data files keep their places there.
    """
    held = {}
    for graph_value in model.graph.initializers.values():
        tensor = graph_value.const_value
        lies = mapped and isinstance(tensor, ir.ExternalTensor)
        fits = tensor is not None and (as_inputs or tensor.dtype in _PLAIN)
        if tensor is not None and fits and tensor.nbytes > INLINE and not lies:
            held[graph_value.name or ""] = tensor
            graph_value.const_value = ir.ExternalTensor(
                "memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(sizes_of(tensor)),
                name=graph_value.name or "", base_dir="")
    try:
        proto = ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            model.graph.initializers[name].const_value = tensor
    if as_inputs:
        _inputs_instead(proto, held)
    return proto


def _inputs_instead(proto: onnx.ModelProto, held: Mapping[str, ir.TensorProtocol]) -> None:
    kept = [t for t in proto.graph.initializer if t.name not in held]
    listed = {v.name for v in proto.graph.input}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(n, int(t.dtype), sizes_of(t))
        for n, t in held.items() if n not in listed)


def external(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the arrays that `skeleton(mapped=True)` leaves out, by name."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype in _PLAIN
            and value.const_value.nbytes > INLINE
            and not isinstance(value.const_value, ir.ExternalTensor)}


def release(model: ir.Model, name: str | None = None) -> bool:
    """Unmap an array of an external data file, or all: it is mapped again when it is asked for.

    False if someone still looks at one.
    """
    values, free = model.graph.initializers, True
    for value in values.values() if name is None else filter(None, (values.get(name),)):
        if isinstance(value.const_value, ir.ExternalTensor):
            try:
                value.const_value.release()
            except BufferError:
                free = False
    return free


def checked_feed(file: OnnxFile, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
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
