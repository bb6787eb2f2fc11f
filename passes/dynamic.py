"""Dynamic programming: the counts with the least total loss that any additive budget allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class Dynamic:
    """min sum_u loss_u(k_u) subject to sum_u saved_u(k_u) >= dense - target, exactly, in `steps`.

    saved_u is what a unit saves by itself (costs that multiply between units are met by `refine`
    afterwards); savings are rounded down to steps. No curve need be convex: a cliff that a greedy
    choice stops at is jumped where what lies behind it is cheap (RD-style bit allocation;
    ZipLM's search, NeurIPS 2023).
    """

    name: ClassVar[str] = "dynamic"
    steps: int = 2000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TypeError("steps must be at least 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        wanted = problem.price(problem.full()) - problem.target
        if wanted <= 0:
            return refine(problem, problem.full())
        step = wanted / self.steps
        best = np.full(self.steps + 1, np.inf)
        best[0] = 0.0
        chosen = []
        for unit in problem.units:
            best, choice = self._add(best, unit, self._saved(problem, unit, step))
            chosen.append(choice)
        if not np.isfinite(best[-1]):
            return refine(problem, problem.least())
        return refine(problem, self._trace_back(problem, chosen, step))

    def _saved(self, problem: Problem, unit: Unit, step: float) -> list[int]:
        return [int(-problem.cost.change(unit.counts(k)) / step) for k in unit.legal]

    def _add(self, best: np.ndarray, unit: Unit,
             saved: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """best[s] = the least loss that saves at least s steps, with one more unit."""
        options = np.empty((len(unit.legal), len(best)))
        for row, (k, s) in enumerate(zip(unit.legal, saved, strict=True)):
            before = np.concatenate([np.full(min(s, len(best)), best[0]), best])[: len(best)]
            options[row] = before + unit.losses[k]
        choice = options.argmin(0)
        return options.min(0), choice

    def _trace_back(self, problem: Problem, chosen: list[np.ndarray],
                    step: float) -> dict[str, int]:
        kept, left = {}, self.steps
        for unit, choice in zip(reversed(problem.units), reversed(chosen), strict=True):
            row = int(choice[left])
            kept[unit.name] = unit.legal[row]
            left = max(0, left - self._saved(problem, unit, step)[row])
        return kept
