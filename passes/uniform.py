"""Uniform allocation: every unit keeps the same share of its slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class Uniform:
    """Keep `round(r * n)` of every unit, one r for all, found by bisection on the real cost.

    A unit that is fibred under another candidate (query heads in KV groups) keeps all of its
    slices: the outer one already takes its share.
    """

    name: ClassVar[str] = "uniform"
    alike: ClassVar[bool] = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        atoms = {g.atom for u in problem.units for g in u.groups}
        inner = {u.name for u in problem.units if atoms & set(u.groups[0].outers)}

        def at(ratio: float) -> dict[str, int]:
            return {u.name: u.legal[-1] if u.name in inner else u.nearest(ratio * u.size)
                    for u in problem.units}

        return refine(problem, nearest(problem, at, 0.0, 1.0, 40))
