"""Stored tensors of a file: found in graphs, bodies and functions, checked before any is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...errors import SpaError
from .shapes import LIMIT, sizes_of
from .skeleton import INLINE


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the graph and those of bodies."""
    yield model.graph
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()
            elif attribute.type == ir.AttributeType.GRAPHS:
                yield from attribute.as_graphs()


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every stored tensor: initialisers and attributes, of functions and bodies too."""
    for graph in graphs(model):
        yield from (v.const_value for v in graph.initializers.values() if v.const_value)
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node, those of bodies and functions too."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def external_files(model: ir.Model) -> set[Path]:
    """Return the data files that stored tensors lie in."""
    return {Path(t.path) for t in tensors(model) if isinstance(t, ir.ExternalTensor)}


def take_in(model: ir.Model) -> None:
    """Hold small external arrays, and those inside of nodes, in memory.

    ONNX's checker looks for them in the current folder when it is given no file.
    """
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and (
                    tensor.nbytes <= INLINE or graph is not model.graph):
                value.const_value = _held(tensor)
    for node in all_nodes(model):
        for name, attribute in list(node.attributes.items()):
            if isinstance(attribute, ir.Attr) and attribute.type == ir.AttributeType.TENSOR \
                    and isinstance(attribute.as_tensor(), ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _held(attribute.as_tensor()))


def _held(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


def check_tensor(tensor: ir.TensorProtocol, place: Path) -> None:
    """Raise SpaError for an absurd size, or external data not whole in the file's folder."""
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


def release(model: ir.Model, name: str | None = None) -> bool:
    """Unmap an array of an external data file, or all: it is mapped again when it is asked for.

    False if someone still looks at one.
    """
    values = model.graph.initializers
    named = values.values() if name is None else filter(None, (values.get(name),))
    return all([let_go(value.const_value) for value in named])


def let_go(tensor: ir.TensorProtocol | None) -> bool:
    """Unmap an array that lies in a data file; False if someone still looks at it."""
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:
            return False
    return True
