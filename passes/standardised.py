"""FLAP's adaptive allocation: scores standardised by group, one threshold over all slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem, Unit


@dataclass(frozen=True)
class Standardised:
    """Keep slices whose z-score (x - mean) / std within their group is above one threshold.

    The threshold is the lowest at which the budget holds: each unit keeps the slices above it, at
    least its floor. FLAP's AL-AM (AAAI 2024), with every slice weighed by its real cost.
    """

    name: ClassVar[str] = "standardised"
    by_layer: ClassVar[bool] = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        scores = {u.name: self._scores(u) for u in problem.units}
        low, high = (f(s.min() if f is min else s.max() for s in scores.values())
                     for f in (min, max))

        def at(threshold: float) -> dict[str, int]:
            return {u.name: u.nearest(int((scores[u.name] > threshold).sum()))
                    for u in problem.units}

        return nearest(problem, at, low - 1.0, high + 1.0, 60, rising=False)

    @staticmethod
    def _scores(unit: Unit) -> np.ndarray:
        """z-scores of a unit's slices, from the steps of its error curve."""
        scores = unit.losses[:-1] - unit.losses[1:]
        return (scores - scores.mean()) / (scores.std() or 1.0)
