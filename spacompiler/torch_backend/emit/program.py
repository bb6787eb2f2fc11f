"""Carry out a plan on the exported program: re-write its size arguments, slice its arrays.

Works for every architecture that traces; the module emitter is checked against it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ...axes.choices import Choices
from ...evidence.where import HERE
from ...groups.solution import Solution
from ...plan.effects import edits, gather_indices
from ...rows.findings import Path
from ..run.aside import Aside
from ..run.runner import Runner, Weights
from ..trace import Trace, copied
from .slicer import Slicer

INDEX = "index_of_"
"""Names of the constants by which gathers pick what stays."""


def edited(trace: Trace, solution: Solution, choices: Choices) -> fx.GraphModule:
    """Return a copy of the program's graph with its size arguments re-written.

    Nodes that were re-written have no known value any more.
    """
    module = copied(trace.program.graph_module)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, path, value, old in edits(solution, choices):
        _set(nodes[name], path, value, old)
        nodes[name].meta = {k: v for k, v in nodes[name].meta.items() if k != "val"}
    for name, (gather, index) in gather_indices(solution, choices).items():
        nodes[name] = _gather(
            module, nodes[name], nodes[gather.source], gather.dim, torch.from_numpy(index))
    for node in module.graph.nodes:  # a view that fits dense strides may not fit the pruned ones
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    module.recompile()
    return module


def _gather(module: fx.GraphModule, node: fx.Node, source: fx.Node, dim: int,
            index: torch.Tensor) -> fx.Node:
    """Replace a node by an index_select of its source; the index is a buffer of the graph."""
    name = f"{INDEX}{node.name}"
    module.register_buffer(name, index)
    with module.graph.inserting_before(node):
        picked = module.graph.call_function(
            torch.ops.aten.index_select.default, (source, dim, module.graph.get_attr(name)))
    node.replace_all_uses_with(picked)
    while node is not source and not node.users:  # the chain that computed it
        before = node.args[0]
        module.graph.erase_node(node)
        node = before  # type: ignore[assignment]
    picked.name = name.removeprefix(INDEX)
    return picked


def _lift_indices(program: ExportedProgram) -> None:
    """Make the indices of gathers constants of the program, which holds no arrays in its graph."""
    module, signature = program.graph_module, copy.deepcopy(program.graph_signature)
    constants = dict(program.constants)
    first = next(i for i, spec in enumerate(signature.input_specs)
                 if spec.kind is InputKind.USER_INPUT)
    for node in [n for n in module.graph.nodes if n.op == "get_attr"
                 and str(n.target).startswith(INDEX)]:
        name = str(node.target)
        inputs = module.graph.find_nodes(op="placeholder")
        with module.graph.inserting_before(inputs[first]):
            given = module.graph.placeholder(f"c_{name}")
        constants[name] = getattr(module, name)
        node.replace_all_uses_with(given)
        module.graph.erase_node(node)
        signature.input_specs.insert(first, InputSpec(
            InputKind.CONSTANT_TENSOR, TensorArgument(given.name), name))
        first += 1
    program._graph_signature, program._constants = signature, constants


def _set(node: fx.Node, path: Path, value: int, old: int) -> None:
    """Put a value at `("args", i)`, `("args", i, j)` or `("kwargs", name)` of a node."""
    holder: Any = list(node.args) if path[0] == "args" else dict(node.kwargs)
    if len(path) == 3:
        items = list(holder[path[1]])
        if items[path[2]] != -1:  # an inferred size stays inferred
            items[path[2]] = _resized(items[path[2]], node, value, old)
        holder[path[1]] = items
    elif path[0] == "args":
        holder[path[1]] = _resized(holder[path[1]], node, value, old)
    else:
        holder[path[1]] = _resized(holder.get(path[1]), node, value, old)
    if path[0] == "args":
        node.args = tuple(holder)
    else:
        node.kwargs = holder


def _resized(have: object, user: fx.Node, value: int, old: int) -> int | fx.Node:
    """The new value; a size that varies between calls (batch x heads) is scaled instead."""
    return _scaled(have, user, value, old) if isinstance(have, fx.Node) else value


def _scaled(size: fx.Node, user: fx.Node, value: int, old: int) -> fx.Node:
    """Insert size * value // old before its user."""
    common = gcd(value, old)
    with user.graph.inserting_before(user):
        times = user.graph.call_function(operator.mul, (size, value // common))
        return user.graph.call_function(operator.floordiv, (times, old // common))


def run_pruned(trace: Trace, solution: Solution, choices: Choices, *,
               wrong: dict[str, Choices] | None = None, double: bool = True,
               watch: Callable[[str, Any], None] | None = None,
               aside: Aside | None = None, cut: Weights | None = None) -> list[Any]:
    """Run the pruned program on the example inputs, slicing each array when it is read.

    `wrong` gives some arrays another choice of slices: the proof's negative control. What it and
    the right run have in common is computed once where both are given one `aside`. `cut` gives
    arrays, by name, that are sliced by these choices already.
    """
    slicer = Slicer(trace, solution, choices)
    wrong = {trace.tied.get(k, k): v for k, v in (wrong or {}).items()}

    def weights(name: str) -> torch.Tensor:
        first = trace.tied.get(name, name)
        if cut is None or first in wrong or (double and slicer.corrects(first)):
            return slicer.array(name, double=double, choices=wrong.get(first))
        return cut(name)

    runner = Runner(trace.program, weights, graph_module=edited(trace, solution, choices),
                    watch=watch,
                    where=trace.proving if double else HERE)
    with torch.no_grad():
        if aside is not None:
            return aside.call(runner, trace.args, trace.kwargs)
        return runner.call(trace.args, trace.kwargs)


def rewrite(trace: Trace, solution: Solution, choices: Choices,
            arrays: dict[str, torch.Tensor] | None = None) -> ExportedProgram:
    """Return the pruned program, with symbolic sizes kept; `arrays` are sliced (and trained)
    ones to share."""
    from .refresh import refresh

    slicer = Slicer(trace, solution, choices)
    given = arrays or {}
    made: dict[str, torch.Tensor] = {}
    for name in slicer.names():  # all of them: `refresh` puts new objects over those that stay
        found = given.get(name, made.get(trace.tied[name]))
        made[name] = slicer.array(name) if found is None else found
    program = copy.copy(trace.exported)
    program._graph_module = edited(trace, solution, choices)
    _lift_indices(program)
    return refresh(program, made)


class Rewritten(nn.Module):
    """A re-written program as a module: same arguments and results as the dense module.

    It computes in eval mode only.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.body = program.module()

    def forward(self, *args: object, **kwargs: object) -> Any:
        """Return the results of the program, as the dense module nests them."""
        return self.body(*args, **kwargs)

    def train(self, mode: bool = True) -> Rewritten:
        """Only eval mode exists; asking for it is allowed."""
        self.training = False
        return self
