"""What torch's ONNX exporter writes wrongly, or fails on, said in a way that it gets right.

Pieces along a dimension that varies become slices, an LSTM with projections (which ONNX has not)
its own steps, a pooling of single places (which ONNX Runtime merges wrongly with a padding before
it) slices with steps, an einsum of numbers of several types one of a single type, and a bias of
zeros that the exporter made for none is left out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch._decomp import decomposition_table
from torch.fx import Graph, GraphModule, Node

from ..torch_backend.read.decompose import Once, fake_mode, replace

_ATEN = torch.ops.aten


def spell_out(module: GraphModule) -> None:
    """Re-write operations of a program that is to be exported, in place."""
    for node in list(module.graph.nodes):
        if node.target is _ATEN.split.Tensor and isinstance(node.args[1], Node):
            _slices(node, node.args[1])
        elif node.target is _ATEN.chunk.default and _varies(node):
            _slices(node, _chunk_size(node))
        elif node.target is _ATEN.lstm.input and _is_projected(node):
            table = {_ATEN.lstm.input: decomposition_table[_ATEN.lstm.input]}
            replace(node, Once(table, fake_mode(module)), lambda inner: True)
        elif str(node.target).startswith("aten.avg_pool") and _takes_single_places(node):
            _strided(node)
        elif node.target is _ATEN.einsum.default:
            _alike(node)


def _takes_single_places(node: Node) -> bool:
    """True for avg_pool(x, kernel, stride, padding, ceil_mode, ...) with windows of one place."""
    kernel, _, padding, ceil = (*node.args[1:], *(None,) * 3)[:4]
    return not node.kwargs and set(_list(kernel)) == {1} and not any(_list(padding)) and not ceil


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _strided(node: Node) -> None:
    """A pooling of windows of one place takes every n-th place along its last dimensions."""
    now, kernel = node.args[:2]
    steps = _list(node.args[2]) if len(node.args) > 2 else []
    rank = int(str(node.target).partition("avg_pool")[2][0])
    steps = (steps or _list(kernel)) * (rank if len(steps or _list(kernel)) == 1 else 1)
    with node.graph.inserting_before(node):
        for dim, step in zip(range(-rank, -1), steps, strict=False):
            now = _number(node.graph, _ATEN.slice.Tensor, (now, dim, 0, _END, step),
                          _sliced(now, dim, step))
    node.target, node.args = _ATEN.slice.Tensor, (now, -1, 0, _END, steps[-1])


_END = 2**63 - 1


def _sliced(node: object, dim: int, step: int) -> torch.Tensor:
    value = _value(node)
    with value.fake_mode:
        made: torch.Tensor = _ATEN.slice.Tensor(value, dim, 0, _END, step)
    return made


def _alike(node: Node) -> None:
    """Cast the operands of an einsum to the type of its result: the exporter takes another one."""
    kind = _value(node).dtype
    operands: Any = node.args[1]
    with node.graph.inserting_before(node):
        made = [x if _value(x).dtype == kind else _number(
            node.graph, _ATEN._to_copy.default, (x,), _value(x).to(kind)) for x in operands]
        for cast, x in zip(made, operands, strict=True):
            if cast is not x:
                cast.kwargs = {"dtype": kind}
    node.args = (node.args[0], made, *node.args[2:])


def _dim(node: Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)


def _varies(node: Node) -> bool:
    return not isinstance(_value(node.args[0]).shape[_dim(node)], int)


def _value(node: object) -> Any:
    assert isinstance(node, Node)
    return node.meta["val"]


def _chunk_size(node: Node) -> Node:
    """The size of a piece: (n + count - 1) // count of n rows."""
    x, count = node.args[:2]
    value = _value(x).shape[_dim(node)]
    with node.graph.inserting_before(node):
        made = _number(node.graph, _ATEN.sym_size.int, (x, _dim(node)), value)
        made = _number(node.graph, operator.add, (made, count - 1),  # type: ignore[operator]
                       value + count - 1)
        return _number(node.graph, operator.floordiv, (made, count),
                       (value + count - 1) // count)


def _number(graph: Graph, op: Callable[..., object], args: tuple[Any, ...],
            value: object) -> Node:
    made: Node = graph.call_function(op, args)
    made.meta["val"] = value
    return made


def _slices(node: Node, size: Node) -> None:
    """Pieces of `size` rows, but for the last one: each is a slice of the whole."""
    users: dict[Node, Any] = {user: user.args[1] for user in node.users
                              if user.target is operator.getitem}
    if len(users) < len(node.users):
        return
    for user, i in users.items():
        with node.graph.inserting_before(user):
            ends = [_number(node.graph, operator.mul, (size, k), _value(size) * k)
                    if k > 1 else size if k else 0 for k in (i, i + 1)]
            piece = node.graph.call_function(
                _ATEN.slice.Tensor, (node.args[0], _dim(node), *ends))
        piece.meta = dict(user.meta)
        user.replace_all_uses_with(piece)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _is_projected(node: Node) -> bool:
    """True for an LSTM whose hidden state is smaller than its cell's."""
    states: Any = node.args[1]
    hidden, cell = (_value(state).shape[-1] for state in states)
    return bool(hidden != cell)


def without_zero_biases(model: ir.Model) -> None:
    """Take away biases of convolutions that are one zero, expanded, in place."""
    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is not None and _is_zeros(bias):
            node.replace_input_with(2, None)


def _is_zeros(value: ir.Value) -> bool:
    maker = value.producer()
    if maker is None:
        return False
    if maker.op_type in ("Expand", "CastLike", "Cast", "Identity"):
        return maker.inputs[0] is not None and _is_zeros(maker.inputs[0])
    found = ir.convenience.get_const_tensor(value)
    return found is not None and found.size == 1 and not found.numpy().any()
