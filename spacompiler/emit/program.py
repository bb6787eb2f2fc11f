"""Carry out a plan on the exported program: re-write its size arguments, slice its arrays.

Works for every architecture that traces; the module emitter is checked against it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..axes import Choices, kept_size
from ..errors import SpaError
from ..frontends.torch_export import Trace, copied
from ..groups import Solution
from ..runner import Runner
from ..slicing import Slicer, norm_changes
from ..solver import Path


def edits(solution: Solution, choices: Choices) -> Iterator[tuple[str, Path, Any]]:
    """Yield (node, path of the argument, new value) for every constant that a plan changes."""
    for edit in solution.solver.edits:
        if kept_size(edit.when, choices) != edit.when.size:
            value = kept_size(edit.expr, choices) if edit.value is None else edit.value
            yield edit.node, edit.path, value
    for change in norm_changes(solution, choices):
        yield change.norm.eps_node, ("args", change.norm.eps_arg), change.eps


def edited(trace: Trace, solution: Solution, choices: Choices) -> fx.GraphModule:
    """Return a copy of the program's graph with its size arguments re-written."""
    module = copied(trace.program.graph_module)
    nodes = {node.name: node for node in module.graph.nodes}
    for name, path, value in edits(solution, choices):
        _set(nodes[name], path, value)
    module.recompile()
    return module


def _set(node: fx.Node, path: Path, value: Any) -> None:
    if path[0] == "kwargs":
        node.kwargs = {**node.kwargs, path[1]: value}
        return
    args = list(node.args)
    if len(path) == 2:
        args[path[1]] = value
    else:
        items = list(args[path[1]])  # type: ignore[arg-type]
        if isinstance(items[path[2]], fx.Node):
            value = _inferred(node, items, path[2])
        if items[path[2]] != -1:
            items[path[2]] = value
        args[path[1]] = items
    node.args = tuple(args)


def _inferred(node: fx.Node, items: list[Any], at: int) -> int:
    """A size that varies between calls and shrinks too: let the view infer it."""
    if any(isinstance(item, int) and item == -1 for i, item in enumerate(items) if i != at):
        raise SpaError(
            f"cannot re-write the sizes of {node.name}",
            why="two of its sizes both vary between calls and shrink",
            fix="trace with fixed sizes, or ignore the groups of this layer (--ignore)")
    return -1


def run_pruned(trace: Trace, solution: Solution, choices: Choices, *,
               wrong: dict[str, Choices] | None = None, double: bool = True,
               watch: Any = None) -> list[Any]:
    """Run the pruned program on the example inputs, slicing each array when it is read.

    `wrong` gives some arrays another choice of slices: the proof's negative control.
    """
    slicer = Slicer(trace, solution, choices)
    wrong = {trace.tied.get(k, k): v for k, v in (wrong or {}).items()}

    def weights(name: str) -> torch.Tensor:
        return slicer.array(name, double=double, choices=wrong.get(trace.tied.get(name, name)))

    runner = Runner(trace.program, weights, graph_module=edited(trace, solution, choices),
                    double=double, watch=watch)
    with torch.no_grad():
        return runner.call(trace.args, trace.kwargs)


def rewrite(trace: Trace, solution: Solution, choices: Choices,
            arrays: dict[str, torch.Tensor] | None = None) -> ExportedProgram:
    """Return the pruned program, with symbolic sizes kept; `arrays` are sliced ones to share."""
    from .refresh import refresh

    slicer = Slicer(trace, solution, choices)
    given = arrays or {}
    made: dict[str, torch.Tensor] = {}
    for name in slicer.names():
        first = trace.tied[name]
        if not slicer.untouched(name):
            made[name] = given.get(name, made.get(first))  # type: ignore[assignment]
            if made[name] is None:
                made[name] = slicer.array(name)
    program = copy.copy(trace.program)
    program._graph_module = edited(trace, solution, choices)
    return refresh(program, made)


class Rewritten(nn.Module):
    """A re-written program as a module: same arguments and results as the dense module.

    It computes in eval mode only.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.body = program.module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def train(self, mode: bool = True) -> Rewritten:
        """Only eval mode exists; asking for it is allowed."""
        self.training = False
        return self
