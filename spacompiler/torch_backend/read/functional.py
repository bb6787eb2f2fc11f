"""Turn operators that write into their operand into ones that do not, where that is safe.

torch's own functionalisation traces the program again, which takes three times as long as the
first trace. Most models only write into a value that nothing else reads (`relu_(x)` is `relu(x)`
if every later reader of x reads its result instead) or into a slice (`x[1:] += y` scatters the
sum back into x).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..trace import Program

_ATEN = torch.ops.aten
# a view -> the operator that puts a changed view back into what it was taken from
_BACK: dict[Any, Any] = {_ATEN.slice.Tensor: _ATEN.slice_scatter.default,
                          _ATEN.select.int: _ATEN.select_scatter.default}


def make_functional(program: Program) -> bool:
    """Return True once no operator of the program writes into an operand or holds a sub-graph.

    Values share storage exactly if their traced ones do, so an alias can't be overlooked. Returns
    False, having changed nothing, where another alias that is older than the write is read after
    it, where a model's input or stored array is written, or where no pure form is known.
    """
    nodes = list(program.graph.nodes)
    writes = [node for node in nodes if not _is_pure(node)]
    if writes and not _are_safe(nodes, writes):
        return False
    now: dict[fx.Node, fx.Node] = {}
    for node in nodes if writes else ():
        for source in node.all_input_nodes:
            if source in now:
                node.replace_input_with(source, _newest(now, source))
        if not _is_pure(node):
            pure, views = _pure(node), list(_views(node.args[0]))
            now |= _written(program.graph, node, views)
            node.target = pure
    return True


def _newest(now: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """What is read in place of a value, by way of what was written over that in turn."""
    found = now[node]
    while found in now:
        found = now[found]
    now[node] = found
    return found


def _are_safe(nodes: list[fx.Node], writes: list[fx.Node]) -> bool:
    """True if all that is read after a write is its result, what it was viewed from, or newer."""
    order = {node: i for i, node in enumerate(nodes)}
    sharing: dict[Any, list[fx.Node]] = {}
    for node in nodes:
        for storage in _storages(node):
            sharing.setdefault(storage, []).append(node)
    for write in writes:
        if _pure(write) is None:
            return False
        known = {write, *_views(write.args[0])}
        for other in {n for s in _storages(write.args[0]) for n in sharing[s]} - known:
            read = max((order[user] for user in other.users), default=-1)
            if other.op == "placeholder" or order[other] < order[write] < read:
                return False
        if any(view.op == "placeholder" for view in known):
            return False
    return True


def _views(node: object) -> Iterator[fx.Node]:
    """A value, what it is a slice of, what that is a slice of, ..."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if node.target in _BACK else None


def _written(graph: fx.Graph, write: fx.Node, views: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """What later readers read instead of the value written and of what it was sliced from."""
    now, at = {views[0]: write}, write
    for view, whole in pairwise(views):
        with graph.inserting_after(at):
            at = graph.call_function(_BACK[view.target],
                                     (view.args[0], now[view], *view.args[1:]), view.kwargs)
        at.meta = {**write.meta, "val": whole.meta["val"]}
        now[whole] = at
    return now


def _storages(node: object) -> set[Any]:
    """The storages of a node's traced results; dropout hands on its operand in eval mode."""
    assert isinstance(node, fx.Node)
    handed_on = _storages(node.args[0]) if "dropout" in str(node.target) and node.args else set()
    values = pytree.tree_leaves(node.meta.get("val"))
    return handed_on | {value.untyped_storage()._cdata for value in values
                        if isinstance(value, torch.Tensor)}


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    return node.op != "call_function" or target is operator.getitem \
        or (isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable) \
        or getattr(target, "__module__", "") == "_operator"


def _pure(node: fx.Node) -> Any:
    """The form of `name_` that does not write, or None: `add_.Tensor` -> `add.Tensor`.

    The result of `name_` has its operand's type whatever the others' is: they must agree.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.args[0], fx.Node):
        return None
    written = [a.name for a in target._schema.arguments if a.alias_info and a.alias_info.is_write]
    space, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    pure = getattr(packet, target._overloadname, None) if packet is not None else None
    types = {v.meta["val"].dtype for v in node.all_input_nodes
             if isinstance(v.meta.get("val"), torch.Tensor)}
    same = len(types) == 1 and name.endswith("_") and written == [target._schema.arguments[0].name]
    return pure if same and pure is not None and not pure._schema.is_mutable else None
