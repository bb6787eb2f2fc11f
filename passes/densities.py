"""Allocations that look at no data: by the shapes of layers, by how concentrated scores are."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, prod
from typing import ClassVar

import numpy as np

from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class Erk:
    """keep_u = min(1, scale (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w)), the scale met by
    the budget: Erdos-Renyi-Kernel densities, small layers keep more of themselves.

    The formula is of one array; a unit's is the mean density of the arrays that make its slices,
    weighed by their sizes. With `random` it is the baseline of "The unreasonable effectiveness of
    random pruning" (ICLR 2022), made for slices.
    """

    name: ClassVar[str] = "erk"
    by_layer: ClassVar[bool] = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        density = {u.name: self._density(problem, u) for u in problem.units}
        most = 1 / min(density.values())

        def at(scale: float) -> dict[str, int]:
            return {u.name: u.nearest(min(1.0, scale * density[u.name]) * u.size)
                    for u in problem.units}

        near = nearest(problem, at, 0.0, most, 40)
        return near if problem.met(near) else refine(problem, near)

    @staticmethod
    def _density(problem: Problem, unit: Unit) -> float:
        """Sums of sizes over products of sizes: (n_in + n_out + ...) / (n_in n_out ...)."""
        own = {m.weight for g in unit.groups for m in g.members if m.role == "producer"}
        shapes = [s for w in sorted(own) if len(s := problem.shapes.get(w, ())) > 1]
        return sum(map(sum, shapes)) / sum(map(prod, shapes)) if shapes else 1.0


@dataclass(frozen=True)
class PqIndex:
    """In rounds, each unit loses what the PQ index of its slices' scores says, until the budget.

    Sparsity-informed adaptive pruning (ICLR 2023): with d slices left, w their scores,
    I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q, r = d (1 + eta)^(-q / (q - p)) (1 - I)^(p q / (q - p))
    and floor(d min(gamma (1 - r / d), beta)) go. I is 0 where all scores are alike and nears 1
    where few slices hold all. Of the last round as much is taken as meets the budget. Made for
    weights; scores of slices stand in their place (`magnitude(norm=1)` is nearest to it).
    """

    name: ClassVar[str] = "pq-index"
    by_layer: ClassVar[bool] = True
    p: float = 0.5
    q: float = 1.0
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.p < self.q or self.eta <= -1 or self.gamma <= 0 or not 0 < self.beta <= 1:
            raise TypeError("0 < p < q, eta above -1, gamma above 0, beta above 0 and at most 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        left = {u.name: u.size for u in problem.units}
        while True:
            then = {u.name: self._left(u.levels[: left[u.name]]) for u in problem.units}
            if then == left:  # the index lets nothing more go
                problem.notes.append("the PQ index lets no more go; the rest goes evenly")
                then = dict.fromkeys(left, 0)
            if problem.price(self._counts(problem, then)) <= problem.target:
                break
            left = then

        def at(part: float) -> dict[str, int]:
            return {u.name: u.nearest(left[u.name] + part * (then[u.name] - left[u.name]))
                    for u in problem.units}

        near = nearest(problem, at, 0.0, 1.0, 40, rising=False)
        return near if problem.met(near) else refine(problem, near)

    def _left(self, scores: np.ndarray) -> int:
        """How many of these slices, d of them, stay after one round."""
        d = len(scores)
        kept = retained(scores, self.p, self.q, self.eta)
        return d - floor(d * min(self.gamma * max(1 - kept / d, 0.0), self.beta)) if d else 0

    @staticmethod
    def _counts(problem: Problem, left: dict[str, int]) -> dict[str, int]:
        return {u.name: u.nearest(left[u.name]) for u in problem.units}


def index(scores: np.ndarray, p: float = 0.5, q: float = 1.0) -> float:
    """Return the PQ index 1 - d^(1/q - 1/p) ||w||_p / ||w||_q of d numbers, by magnitude.

    >>> index(np.ones(7)), round(index(np.array([1.0, 0.0, 0.0, 0.0])), 6)
    (0.0, 0.75)
    """
    w = np.abs(scores)
    if not w.any():
        return 0.0
    w = w / w.max()
    ratio = (w ** p).sum() ** (1 / p) / (w ** q).sum() ** (1 / q)
    return float(1 - len(w) ** (1 / q - 1 / p) * ratio)


def retained(scores: np.ndarray, p: float, q: float, eta: float) -> float:
    """Return r, the bound on how many of the scores are to be kept."""
    return float(len(scores) * (1 + eta) ** (-q / (q - p))
                 * (1 - index(scores, p, q)) ** (p * q / (q - p)))
