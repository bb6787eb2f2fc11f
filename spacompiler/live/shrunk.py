"""The trace and the solution of a model that has just shrunk, without tracing it again.

A plan's atoms are replaced by smaller ones in every expression and the size arguments of the
program are re-written, so that the next plan is made on the small model as on any other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from spacompiler.axes.choices import Choices, keep_mask
from spacompiler.axes.expressions import Atom, Expr, Prod, concat, deal, product, resolve
from spacompiler.graph.idioms import RmsNorm
from spacompiler.graph.ir import Graph
from spacompiler.groups.solution import Group, Solution
from spacompiler.plan.effects import norm_changes
from spacompiler.torch_backend.emit.program import edited
from spacompiler.torch_backend.trace import Trace

New = Mapping[Atom, Atom]


def shrunk(trace: Trace, solution: Solution, choices: Choices) -> tuple[Trace, Solution]:
    """Return trace and solution after a plan; the arrays are those of the live module.

    The program's arrays are looked up by name when it runs: a module that was operated on in
    place is seen as it is.
    """
    program = copy.copy(trace.exported)
    program._graph_module = edited(trace, solution, choices)
    new = {atom: Atom(choice.count, atom.serial, atom.reasons)
           for atom, choice in choices.items()}
    return replace(trace, program=program), _solution(solution, choices, new)


def shrink(e: Expr, new: New, choices: Choices) -> Expr:
    """Return an expression over the new atoms."""
    e = resolve(e)
    if isinstance(e, Atom):
        return new.get(e, e)
    parts = [shrink(part, new, choices) for part in e.parts]
    if isinstance(e, Prod) or e.order is None:
        return product(parts) if isinstance(e, Prod) else concat(parts)
    kept = e.order[np.broadcast_to(keep_mask([e], choices), [e.size])]
    return deal(concat(parts), kept.argsort().argsort())


def _solution(solution: Solution, choices: Choices, new: New) -> Solution:
    old = solution.solver
    seen: dict[int, Expr] = {}

    def to(e: Expr) -> Expr:
        if id(e) not in seen:
            seen[id(e)] = shrink(e, new, choices)
        return seen[id(e)]

    def all_to(exprs: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(map(to, exprs))

    dims = {name: all_to(found) for name, found in old.dims.items()}
    graph = _graph(solution.graph, dims)
    solver = replace(
        old, graph=graph, dims=dims, norms=_norms(solution, choices),
        edits=[e._replace(expr=to(e.expr), when=to(e.when)) for e in old.edits],
        contractions=[c._replace(letters={k: to(e) for k, e in c.letters.items()},
                                 macs=all_to(c.macs)) for c in old.contractions],
        roles=[(to(e), tag) for e, tag in old.roles],
        least=[(to(e), k) for e, k in old.least],
        labels={name: label._replace(axis=to(label.axis)) for name, label in old.labels.items()},
        approximate=[(to(e), why) for e, why in old.approximate])
    groups = {name: _group(group, new) for name, group in solution.groups.items()}
    return Solution(graph, solver, groups)


def _graph(graph: Graph, dims: Mapping[str, tuple[Expr, ...]]) -> Graph:
    tensors = {name: replace(t, shape=tuple(e.size for e in dims[name]))
               for name, t in graph.tensors.items()}
    return replace(graph, tensors=tensors)


def _norms(solution: Solution, choices: Choices) -> dict[str, RmsNorm]:
    changed = {change.norm.gain: change for change in norm_changes(solution, choices)}
    return {key: replace(norm, eps=changed[norm.gain].eps) if norm.gain in changed else norm
            for key, norm in solution.solver.norms.items()}


def _group(group: Group, new: Mapping[Atom, Any]) -> Group:
    return replace(group, atom=new.get(group.atom, group.atom),
                   outers=tuple(new.get(o, o) for o in group.outers))
