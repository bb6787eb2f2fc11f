"""Tried allocation: the best of some allocations, by what each does to the network's results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar

from spacompiler.errors import SpaError
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.passes.uniform import Uniform
from spacompiler.plan.problem import Measured, Problem


@dataclass(frozen=True)
class Tried:
    """Allocate uniformly, by one ranking of all units, and by either within one role alone; keep
    the counts whose masked network stays nearest to the dense one.

    Scores of one group need not be comparable with another's, and some roles (heads) may cost
    more than others save: this is found by a forward pass over `batches` of the calibration for
    each candidate, without repair; what has lost more than `near` times the least on the first of
    them is not looked at further. What cannot be measured falls back to uniform.
    """

    name: ClassVar[str] = "tried"
    batches: int = 4
    near: float = 1.25

    def __post_init__(self) -> None:
        if self.batches < 1 or self.near < 1:
            raise TypeError("batches and near must be at least 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit: those that lost least; ties go to the first."""
        plans = dict(self._plans(problem))
        if problem.measure is None or len(plans) == 1:
            return plans["uniform"]
        lost, close = self._lost(problem, problem.measure, plans)
        best = min(close, key=lambda name: lost[name])
        far = "; of what is far behind, on the first batch alone" if len(close) < len(lost) else ""
        problem.notes.append("allocation tried: " + ", ".join(
            f"{name} {value:.3g}" for name, value in lost.items())
            + f" (divergence from the dense network{far}); {best} is taken")
        return plans[best]

    def _lost(self, problem: Problem, measure: Measured, plans: dict[str, dict[str, int]]) -> tuple[
            dict[str, float], list[str]]:
        """The divergence of each plan, and those that are close on the first batch: theirs is of
        all batches."""

        def lost(name: str, batches: int, skip: int = 0) -> float:
            found = measure.lost(problem, plans[name], batches, skip)
            return max(found, 0.0) if isfinite(found) else float("inf")  # below: rounding

        first = {name: lost(name, 1) for name in plans}
        count = min(self.batches, len(measure.batches))
        close = [n for n, value in first.items() if value <= self.near * min(first.values())]
        if count > 1:
            first |= {n: (first[n] + (count - 1) * lost(n, count, 1)) / count for n in close}
        return first, close

    def _plans(self, problem: Problem) -> Iterator[tuple[str, dict[str, int]]]:
        """Candidates that meet the target, by name; uniform in any case, equal ones once."""
        seen = [Uniform().allocate(problem)]
        yield "uniform", seen[0]
        roles = dict.fromkeys(u.groups[0].role for u in problem.units if len(u.legal) > 1)
        alone = [(f" within {role}", _only(problem, role)) for role in roles] \
            if len(roles) > 1 else []
        # shares of importance, as they are: what they lead to is measured anyway
        for where, some in (("", replace(problem, losses="exact")), *alone):
            for how in (GlobalRanking(checked=False), Uniform()):
                try:
                    kept = how.allocate(some)
                except SpaError:
                    continue
                if kept not in seen and problem.met(kept):
                    seen.append(kept)
                    yield how.name + where, kept


def _only(problem: Problem, role: str) -> Problem:
    """The same problem, in which units of other roles stay whole."""
    return replace(problem, losses="exact", units=tuple(
        u if u.groups[0].role == role else replace(u, legal=u.legal[-1:]) for u in problem.units))
