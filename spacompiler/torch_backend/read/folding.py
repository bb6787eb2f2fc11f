"""Weights that are statistics of other weights: computed once, and constants from then on.

A standardised convolution divides each filter by the deviation of its entries, weight norm by their
length: taking an input channel away would change what stays. Its result depends on no input,
though, so that the network computes the same with that result stored, and every channel of it may
go. The program then no longer holds what it was computed from; the module's own code still would
compute it, so that such a network is emitted as a program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ..trace import Program

SHARE = 0.1
"""Fewer parameters than this share are left to the module's code: a program costs more."""

_STATISTICS = frozenset("""batch_norm native_batch_norm layer_norm native_layer_norm group_norm
instance_norm var var_mean std std_mean _weight_norm _weight_norm_interface norm linalg_vector_norm
mean mv""".split())
_STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def fold_weights(program: Program) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Store results that are statistics of weights.

    Returns the names of what is no longer read and, for each array that was stored instead, the
    names of those that it is computed from.

    Changes the program where at least `SHARE` of its parameters are concerned.
    """
    specs = program.graph_signature.input_specs
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    stored = {node: str(spec.target) for node, spec in zip(places, specs, strict=True)
              if spec.kind in _STORED}
    sources = _sources(program.graph, stored)
    found = [node for node in _read_with_inputs(program.graph, sources)
             if any(_is_statistic(before) for before in _before(node))]
    inside = {n for node in found for n in _before(node)}
    gone = {n: name for n, name in stored.items()
            if n in inside and all(user in inside for user in n.users)}
    parameters = {node for node, spec in zip(places, specs, strict=True)
                  if spec.kind is InputKind.PARAMETER}
    if _numel(parameters & gone.keys()) < SHARE * _numel(parameters):
        return (), {}
    values = {**program.constants, **program.state_dict}
    made = {}
    for node in found:
        origin = tuple(stored[n] for n in _before(node) if n in stored)
        made[_store(program, node, _value(node, {n: values[m] for n, m in stored.items()}))] = \
            origin
    _drop(program, gone)
    return tuple(gone.values()), made


def _sources(graph: fx.Graph, stored: dict[fx.Node, str]) -> set[fx.Node]:
    """Results that depend on stored arrays alone (and the arrays)."""
    found = set(stored)
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and \
                all(before in found for before in node.all_input_nodes):
            found.add(node)
    return found


def _read_with_inputs(graph: fx.Graph, sources: set[fx.Node]) -> Iterator[fx.Node]:
    """Those of the results that an operator reads beside others: where stored and computed meet."""
    for node in graph.nodes:
        if node in sources and node.op == "call_function" and \
                isinstance(node.meta.get("val"), torch.Tensor) and \
                any(user not in sources and user.op != "output" for user in node.users):
            yield node


def _before(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it is computed from."""
    open_, seen = [node], {node}
    while open_:
        now = open_.pop()
        yield now
        fresh = [n for n in now.all_input_nodes if n not in seen]
        seen.update(fresh)
        open_.extend(fresh)


def _is_statistic(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and \
        target._schema.name.partition("::")[2] in _STATISTICS


def _numel(nodes: Iterable[fx.Node]) -> int:
    return sum(prod(n.meta["val"].shape) for n in nodes)


def _value(node: fx.Node, stored: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """Compute one result from stored arrays, in float64."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    values: dict[fx.Node, Any] = {}
    for now in sorted(_before(node), key=order.__getitem__):
        if now in stored:
            array = stored[now].detach()
            values[now] = array.double() if array.is_floating_point() else array
        else:
            args, kwargs = fx.node.map_arg((now.args, now.kwargs), values.__getitem__)
            values[now] = now.target(*args, **kwargs)  # type: ignore[operator]
    return values[node].to(node.meta["val"].dtype).contiguous()


def _store(program: Program, node: fx.Node, value: torch.Tensor) -> str:
    """Let a stored array, put before all others, take the place of a result; returns its name."""
    name = f"{node.name}_folded"
    with program.graph.inserting_before(next(iter(program.graph.nodes))):
        made = program.graph.placeholder(f"p_{name}")
    made.meta["val"] = node.meta["val"]
    program.graph_signature.input_specs.insert(
        0, InputSpec(InputKind.PARAMETER, TensorArgument(made.name), name))
    program.state_dict[name] = torch.nn.Parameter(value, requires_grad=False)
    node.replace_all_uses_with(made)
    return name


def _drop(program: Program, gone: dict[fx.Node, str]) -> None:
    """Take results that nothing reads any more, and the arrays `gone`, out of the program."""
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and not node.users and _depends_on(node, gone):
            program.graph.erase_node(node)
    for node, name in gone.items():
        specs = program.graph_signature.input_specs
        specs[:] = [s for s in specs if getattr(s.arg, "name", "") != node.name]
        program.graph.erase_node(node)
        program.state_dict.pop(name, None)
        program.constants.pop(name, None)


def _depends_on(node: fx.Node, gone: dict[fx.Node, str]) -> bool:
    return any(before in gone for before in _before(node))
