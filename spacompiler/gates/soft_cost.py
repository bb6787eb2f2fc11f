"""What a network costs as a differentiable function of how much of each group is open.

The same sums of products of sizes as `groups.cost`, with fractions of slices: at whole counts both
are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from ..axes.expressions import Atom, Expr, Prod, atoms, resolve
from ..groups.cost import Cost
from ..groups.solution import Group

Open = Mapping[Atom, torch.Tensor]


class SoftCost:
    """A cost as a function of gates; other groups stand as the cost has them now."""

    def __init__(self, cost: Cost, groups: Sequence[Group]) -> None:
        own = {g.atom for g in groups}
        self._counts, self._groups = dict(cost.counts), tuple(groups)
        varies = [bool(own & {a for e in t.exprs for a in atoms(e)}) for t in cost.terms]
        self._terms = [t for t, v in zip(cost.terms, varies, strict=True) if v]
        self._fixed = cost.total - sum(
            t.factor * prod(int(self._size(e, {})) for e in t.exprs) for t in self._terms)

    def __call__(self, opened: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the cost of gates by group; those of one outer slice are averaged over all."""
        counts = {g.atom: opened[g.name].reshape(-1, g.size).sum(-1).mean() for g in self._groups}
        total = torch.tensor(float(self._fixed))
        for term in self._terms:
            made: float | torch.Tensor = float(term.factor)
            for e in term.exprs:
                made = made * self._size(e, counts)
            total = total + made
        return total

    def _size(self, e: Expr, counts: Open) -> float | torch.Tensor:
        e = resolve(e)
        if isinstance(e, Atom):
            return counts[e] if e in counts else float(self._counts.get(e, e.size))
        sizes = [self._size(part, counts) for part in e.parts]
        return prod(sizes) if isinstance(e, Prod) else sum(sizes)
