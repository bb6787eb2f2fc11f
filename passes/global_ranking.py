"""Global allocation: take from whichever unit loses least importance per unit of cost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class GlobalRanking:
    """Greedy: the next step is the one with the least share of importance lost per cost saved.

    Scores are standardised by each group's total, costs are read from the graph as it shrinks
    (lazily: a step's price is checked again when it comes up).
    """

    name: ClassVar[str] = "global"

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        kept = problem.full()
        total = problem.price(kept)
        units = {u.name: u for u in problem.units}
        heap = [(self._rate(problem, u, u.legal[-1]), u.name) for u in problem.units
                if len(u.legal) > 1]
        heapq.heapify(heap)
        while heap and total > problem.target:
            _, name = heapq.heappop(heap)
            unit = units[name]
            rate = self._rate(problem, unit, kept[name])
            if heap and rate > heap[0][0]:
                heapq.heappush(heap, (rate, name))
                continue
            kept[name] = unit.legal[unit.legal.index(kept[name]) - 1]
            total = problem.cost.set(unit.counts(kept[name]))
            if kept[name] > unit.legal[0]:
                heapq.heappush(heap, (self._rate(problem, unit, kept[name]), name))
        return kept if problem.met(kept) else refine(problem, kept)

    @staticmethod
    def _rate(problem: Problem, unit: Unit, at: int) -> float:
        """Importance lost per cost saved by the unit's next step down."""
        below = unit.legal[unit.legal.index(at) - 1]
        saved = -problem.cost.change(unit.counts(below))
        lost = float(unit.losses[below] - unit.losses[at])
        return lost / saved if saved > 0 else float("inf")
