"""What a plan changes in a program beside widths: norms, gathers, edits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..axes.choices import Choices, keep_mask, kept_size
from ..axes.expressions import atoms
from ..graph.idioms import RmsNorm
from ..groups.solution import Solution
from ..rows.findings import Gather, Path


def edits(solution: Solution, choices: Choices) -> Iterator[tuple[str, Path, Any, Any]]:
    """Yield (node, path of the argument, value, old value) for each constant that changes."""
    for edit in solution.solver.edits:
        if kept_size(edit.when, choices) != edit.when.size:
            value = kept_size(edit.expr, choices) + edit.plus if edit.value is None else edit.value
            yield edit.node, edit.path, value, edit.expr.size + edit.plus
    for change in norm_changes(solution, choices):
        yield change.norm.eps_node, ("args", change.norm.eps_arg), change.eps, change.norm.eps


def touched(solution: Solution, choices: Choices) -> dict[str, set[str]]:
    """Which tensors each node reads through a mask: activations, or weights if it has no other.

    What a recurrent layer feeds back is no tensor of the graph: the weights that read it are.
    """
    found: dict[str, set[str]] = {}
    stored: dict[str, set[str]] = {}
    always: dict[str, set[str]] = {}
    for read in solution.solver.reads:
        if choices.keys() & set(atoms(solution.solver.dims[read.tensor][read.dim])):
            static = solution.graph.tensors[read.tensor].static
            kind = always if read.how == "recurrent" else stored if static else found
            kind.setdefault(read.node, set()).add(read.tensor)
    merged = {**stored, **found}
    for node, read_too in always.items():
        merged[node] = merged.get(node, set()) | read_too
    return merged


def rescaled(solution: Solution, choices: Choices) -> set[str]:
    """Values inside pruned RMSNorms, which differ by the factor that the gain undoes."""
    norms = [change.norm for change in norm_changes(solution, choices)]
    means, weights = {norm.mean for norm in norms}, {norm.gain for norm in norms}
    gains = {t.name for t in solution.graph.tensors.values() if t.weight in weights}
    inside: set[str] = set()
    for node in solution.graph.nodes:
        refs = set(node.refs())
        if refs and refs <= gains:  # the gain cast, or with a constant added
            gains.update(node.outputs)
        elif not refs & gains and (node.name in means or refs & inside):
            inside.update(node.outputs)
    return inside | gains


@dataclass(frozen=True, slots=True)
class NormChange:
    """A pruned RMSNorm: its idiom, and the width before and after."""

    norm: RmsNorm
    before: int
    after: int

    @property
    def eps(self) -> float:
        """The eps that adds as much to a mean over fewer channels."""
        return self.norm.eps * self.before / self.after

    @property
    def gain(self) -> float:
        """The factor of the gains, which undoes what a mean over fewer channels changes."""
        return (self.before / self.after) ** self.norm.power


def norm_changes(solution: Solution, choices: Choices) -> Iterator[NormChange]:
    """Yield every RMSNorm whose axis shrinks."""
    for norm in solution.solver.norms.values():
        e = solution.solver.dims[norm.source][-1]
        after = kept_size(e, choices)
        if after != e.size:
            yield NormChange(norm, e.size, after)


def gather_indices(solution: Solution, choices: Choices) -> dict[str, tuple[Gather, np.ndarray]]:
    """Return, by node, the gathers whose source shrinks, each with its index among kept slices."""
    found = {}
    for gather in solution.solver.gathers:
        source, result = (solution.solver.dims[t][gather.dim]
                          for t in (gather.source, gather.result))
        if any(kept_size(e, choices) != e.size for e in solution.solver.dims[gather.source]):
            stays, wanted = (np.broadcast_to(keep_mask([e], choices), [e.size])
                             for e in (source, result))
            rank, kept = np.cumsum(stays) - 1, gather.index[wanted]
            found[gather.node] = gather, rank[kept]
    return found
