"""Tried allocation: the best of some allocations, by what each does to the network's results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite, isnan
from typing import ClassVar

from spacompiler.errors import SpaError
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.passes.uniform import Uniform
from spacompiler.plan.problem import Measured, Problem


@dataclass(frozen=True)
class Tried:
    """Allocate uniformly, by one ranking of all units (by what is left of each, and by sums of
    importance as they are), and by either within one role alone; keep the counts whose masked
    network stays nearest to the dense one.

    Scores of one group need not be comparable with another's, and some roles (heads) may cost
    more than others save: this is found by forward passes of each candidate, without repair, over
    at most `batches` of the calibration, and no further ones once `positions` (tokens, examples)
    were seen. What has lost more than `near` times the least on the first batch is not looked at
    further; the margin shrinks with the batches seen, and is twice as wide where one text has been.
    What cannot be measured falls back to uniform.
    """

    name: ClassVar[str] = "tried"
    batches: int = 4
    near: float = 1.25
    positions: int = 512

    def __post_init__(self) -> None:
        if self.batches < 1 or self.near < 1 or self.positions < 1:
            raise TypeError("batches, near and positions must be at least 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit: those that lost least; ties go to the first."""
        plans = dict(self._plans(problem))
        if problem.measure is None or len(plans) == 1:
            return plans["uniform"]
        lost, close = self._lost(problem, problem.measure, plans)
        best = min(close, key=lambda name: lost[name])
        far = "; of what is far behind, on fewer batches" if len(close) < len(lost) else ""
        problem.notes.append("allocation tried: " + ", ".join(
            f"{name} {value:.3g}" for name, value in lost.items())
            + f" (divergence from the dense network{far}); {best} is taken")
        return plans[best]

    def _lost(self, problem: Problem, measure: Measured, plans: dict[str, dict[str, int]]) -> tuple[
            dict[str, float], list[str]]:
        """The divergence of each plan, and those that stayed close: theirs is of the most batches.
        """
        mean, close = self._glanced(problem, measure, plans)
        total = dict.fromkeys(plans, 0.0)
        for seen in range(1, 1 + measure.few(self.batches, self.positions)):
            for name in close:
                found = measure.lost(problem, plans[name], seen, seen - 1)
                total[name] += max(found, 0.0) if isfinite(found) else float("inf")
                mean[name] = total[name] / seen
            close = self._close(close, mean, seen)
            if len(close) == 1 or (seen == 1 and min(mean[n] for n in close) > problem.bound):
                break
        return mean, close

    def _glanced(self, problem: Problem, measure: Measured, plans: dict[str, dict[str, int]]
                 ) -> tuple[dict[str, float], list[str]]:
        """What one example says of plans, where it says enough, and those that are worth more."""
        said = measure.glances(problem, list(plans.values()))
        if all(map(isnan, said)):
            return {}, list(plans)
        found = {name: value if isfinite(value) else float("inf")
                 for name, value in zip(plans, said, strict=True)}
        return found, self._close(list(plans), found, 1 / 2)

    def _close(self, names: list[str], lost: dict[str, float], seen: float) -> list[str]:
        """Those of some plans that are near to the best of them, so many batches seen."""
        least = (1 + (self.near - 1) / seen) * min(lost[name] for name in names)
        return [name for name in names if lost[name] <= least]

    def _plans(self, problem: Problem) -> Iterator[tuple[str, dict[str, int]]]:
        """Candidates that meet the target, by name; uniform in any case, equal ones once."""
        seen = [Uniform().allocate(problem)]
        yield "uniform", seen[0]
        roles = dict.fromkeys(u.groups[0].role for u in problem.units if len(u.legal) > 1)
        alone = [(f" within {role}", _only(problem, role)) for role in roles] \
            if len(roles) > 1 else []
        # sums of importance as they are, too: what they lead to is measured anyway
        sums = (" by sums", replace(problem, losses="exact"))
        for where, some in (("", problem), sums, *alone):
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
