"""Spell out operators that no row of the table knows by operators that rows know.

torch says how: most of its operators have a decomposition. One operation at a time is traced on
its own values, which takes a hundredth of the time of torch's way, which traces the whole program
again. What torch cannot spell out so stays, and freezes what it touches.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import Argument

Known = Callable[[str], bool]


def spell_out(graph: fx.Graph, known: Known) -> None:
    """Replace operators that are not `known` by name, where what they consist of is, in place."""
    strange = [node for node in graph.nodes if _is_strange(node, known)]
    if not strange:
        return
    table = {op: way for op, way in decomposition_table.items() if not known(str(op))}
    once = Once(table, _mode(graph) or FakeTensorMode())
    for node in strange:
        try:
            replace(node, once, lambda inner: _is_known(inner, known))
        except Exception:  # a surprise in one operator: it stays what it was
            continue
    graph.eliminate_dead_code()


def fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    """The mode, with its symbols, under which a program was traced."""
    return _mode(module.graph) or FakeTensorMode()


def _mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode of a graph's values, if they are fake."""
    values = (node.meta.get("val") for node in graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def _is_strange(node: fx.Node, known: Known) -> bool:
    """Whether a node is an operator on tensors that is not known and that torch can spell out."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or known(str(target)):
        return False
    tensors = any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
    composite = target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd)  # type: ignore[attr-defined]
    return tensors and (composite or target in decomposition_table)


@dataclass
class Once:
    """Operations of one program, each traced once: what repeats in every block consists of the
    same. `table` says how torch decomposes operators, `mode` has the symbols of its sizes."""

    table: Mapping[Any, Any]
    mode: FakeTensorMode
    _made: dict[str, fx.Graph] = field(default_factory=dict)

    def of(self, node: fx.Node) -> fx.Graph:
        """Return what an operation consists of, on the fake values of its operands."""
        operands = node.all_input_nodes
        key = _signature(node, operands)
        if key not in self._made:
            self._made[key] = self._trace(node, operands)
        return self._made[key]

    def _trace(self, node: fx.Node, operands: list[fx.Node]) -> fx.Graph:
        def call(*values: Argument) -> Any:
            lookup = dict(zip(operands, values, strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), lookup.__getitem__)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with self.mode, enable_python_dispatcher(), torch.no_grad():
            traced = _traced(call, self.table, [_on_cpu(n.meta["val"]) for n in operands])
        _drop_restrides(traced.graph)
        for inner in traced.graph.nodes:  # an operation has a place, what it consists of has none
            inner.meta = {k: v for k, v in inner.meta.items() if k not in _PLACE}
        return traced.graph


def _signature(node: fx.Node, operands: list[fx.Node]) -> str:
    """What decides what an operation consists of: operator, arguments, kinds and sizes of values.
    """
    args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{operands.index(n)}")
    return repr((str(node.target), args, [_kind(n.meta["val"]) for n in operands]))


def _kind(value: object) -> tuple[object, ...]:
    if not isinstance(value, torch.Tensor):
        return type(value), str(value)
    known = getattr(value, "constant", None)  # numbers that tracing may look at
    return value.dtype, value.device, str(value.shape), str(value.stride()), \
        value.requires_grad, None if known is None else id(known)


def replace(node: fx.Node, once: Once, fits: Callable[[fx.Node], bool]) -> None:
    """Put the operations that an operation consists of in its place.

    Raises ValueError if one of them does not fit.
    """
    made = once.of(node)
    for inner in made.nodes:
        if (inner.op == "call_function" and not fits(inner)) or inner.op not in _OPS:
            raise ValueError(f"{node.target} consists of {inner.target}")
    copies = dict(zip(made.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(made, copies)
    for inner in made.nodes:
        if inner.op == "call_function":
            copies[inner].meta |= {k: node.meta[k] for k in _PLACE if k in node.meta}
    _take_place(node, result)


def _traced(call: Callable[..., Any], table: Mapping[Any, Any],
            values: list[Any]) -> fx.GraphModule:
    """The operations that a call consists of, none of which writes into an operand.

    What torch's own code consists of may write into what it made (the mean of an RMSNorm, to which
    its constant is added): that shows only once the call is taken apart, so that it is then traced
    again, without writes, before the table is asked.
    """
    traced = make_fx(functionalize(call), decomposition_table=dict(table))(*values)
    if any(_writes(node) for node in traced.graph.nodes):
        plain = make_fx(functionalize(call))(*values)
        traced = make_fx(functionalize(plain), decomposition_table=dict(table))(*values)
    return traced


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _drop_restrides(graph: fx.Graph) -> None:
    """Take out what only says how a value of one place along a dimension lies in memory, in place.

    A pooling to one place does so where its operand lies with channels last.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):
        source = node.args[0]
        if len(node.args) == 3 and _lie_alike(source.meta["val"], node.meta["val"]):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _lie_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values of equal shapes have the same strides wherever there are several places.
    """
    return one.shape == other.shape and all(
        size == 1 or statically_known_true(a == b)
        for size, a, b in zip(one.shape, one.stride(), other.stride(), strict=True))


def _on_cpu(value: object) -> Any:
    """A value without data that stands for one on the CPU (of the mode, if it is on meta)."""
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


_OPS = ("placeholder", "call_function", "output")
_PLACE = ("nn_module_stack", "stack_trace")


def _take_place(node: fx.Node, result: object) -> None:
    """Let values stand for a node's, under their names: the signature knows outputs by name."""
    stand: dict[fx.Node, object] = {node: result}
    if isinstance(result, (tuple, list)):
        stand = {user: result[user.args[1]] for user in list(node.users)  # type: ignore[index]
                 if user.target is operator.getitem}
    pairs = [(old, new) for old, new in stand.items() if isinstance(new, fx.Node)]
    if len(pairs) < len(stand):
        raise ValueError(f"{node.target} returns lists")
    for old, new in pairs:
        old.replace_all_uses_with(new)
        name = old.name
        old.graph.erase_node(old)
        if new.op != "placeholder" and any(user.op == "output" for user in new.users):
            new.name = name
    if not isinstance(result, fx.Node):
        node.graph.erase_node(node)


def _is_known(node: fx.Node, known: Known) -> bool:
    """Whether a row knows an operator, or none is needed: sizes, or what reads no tensor."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__module__", "") == "_operator"
    return target is torch.ops.aten.sym_size.int or known(str(target)) or \
        not node.all_input_nodes
