"""One threshold: every slice whose score lies above it stays, whatever group it is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class Threshold:
    """Keep slices whose score, as it is, is above one threshold: the one next to the budget.

    With `magnitude` it is Global MP (2022), made for slices: mean squares of groups under one
    threshold, `--floor` its least share of each layer. With `fluctuation(standardised=True)` it is
    FLAP's AL-AM (AAAI 2024), every slice weighed by its real cost. Single slices settle what is
    left of the budget, if any. Scores of different groups are taken to be in one unit, whether
    they are or not.
    """

    name: ClassVar[str] = "threshold"
    by_layer: ClassVar[bool] = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit: those above the threshold, at least the floor."""
        every = np.unique(np.concatenate([[-np.inf], *(u.levels for u in problem.units)]))

        def at(place: float) -> dict[str, int]:
            threshold = every[min(int(place), len(every) - 1)]
            return {u.name: u.nearest(int((u.levels > threshold).sum())) for u in problem.units}

        near = nearest(problem, at, 0.0, float(len(every)), len(every).bit_length() + 1,
                       rising=False)
        return near if problem.met(near) else refine(problem, near)
