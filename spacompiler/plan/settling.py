"""Single steps that bring a cost to its target, the best one first, in time linear in their number.

Every unit may keep the next smaller or the next larger legal count; what each such step changes
is kept in order, and after a step only those are priced anew that share a term with it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

from .problem import Problem


def refine(problem: Problem, kept: dict[str, int]) -> dict[str, int]:
    """Move units by legal steps while that brings the cost nearer to the target.

    Where single steps get stuck short of the tolerance, a coarse unit is moved first and the
    others settle around it.
    """
    kept = settle(problem, kept)
    coarse = sorted((u for u in problem.units if len(u.legal) > 1),
                    key=lambda u: -abs(problem.cost.change(u.counts(u.legal[-2]))))[:8]
    for unit in coarse:
        if problem.met(kept):
            break
        for by in (1, -1):
            at = unit.legal.index(kept[unit.name]) + by
            if 0 <= at < len(unit.legal):
                other = settle(problem, {**kept, unit.name: unit.legal[at]}, but=unit.name)
                if _miss(problem, other) < _miss(problem, kept):
                    kept = other
    problem.price(kept)
    return kept


def _miss(problem: Problem, kept: Mapping[str, int]) -> float:
    return abs(problem.price(kept) - problem.target)


def settle(problem: Problem, kept: dict[str, int], but: str = "") -> dict[str, int]:
    """Take the single step that helps most until none does (`but` names a unit to leave)."""
    kept = dict(kept)
    miss = problem.price(kept) - problem.target
    steps = _Steps(problem, kept, but)
    for _ in range(10 * sum(len(u.legal) for u in problem.units)):
        which = steps.nearest(-miss)
        if which is None or not abs(miss + steps.change[which]) < abs(miss):
            break
        miss = steps.take(which) - problem.target
    return steps.kept


class _Steps:
    """The steps that there are: number 2i makes unit i smaller, 2i + 1 larger."""

    def __init__(self, problem: Problem, kept: dict[str, int], but: str) -> None:
        self.problem, self.kept, self.but = problem, kept, but
        self.change: dict[int, int] = {}
        self.ordered: list[tuple[int, int]] = []
        self.owners = {g.atom: i for i, u in enumerate(problem.units) for g in u.groups}
        for i in range(len(problem.units)):
            self._find(i)
        self.ordered = sorted((change, step) for step, change in self.change.items())

    def _find(self, i: int) -> Iterable[int]:
        """Price the steps of one unit; returns their numbers."""
        unit = self.problem.units[i]
        at = unit.legal.index(self.kept[unit.name])
        for step, to in ((2 * i, at - 1), (2 * i + 1, at + 1)):
            self.change.pop(step, None)
            if unit.name != self.but and 0 <= to < len(unit.legal):
                self.change[step] = self.problem.cost.change(unit.counts(unit.legal[to]))
        return [step for step in (2 * i, 2 * i + 1) if step in self.change]

    def nearest(self, wanted: float) -> int | None:
        """Return the step whose change is nearest to the wanted one, the first of equals."""
        at = bisect_left(self.ordered, (wanted,))
        found = [self.ordered[at]] if at < len(self.ordered) else []
        if at:
            found.append(self.ordered[bisect_left(self.ordered, (self.ordered[at - 1][0],))])
        return min(((abs(change - wanted), step) for change, step in found),
                   default=(0, None))[1]

    def take(self, which: int) -> int:
        """Take a step, price its neighbours anew, and return the new total."""
        unit = self.problem.units[which // 2]
        at = unit.legal.index(self.kept[unit.name])
        self.kept[unit.name] = unit.legal[at + (1 if which % 2 else -1)]
        total = self.problem.cost.set(unit.counts(self.kept[unit.name]))
        near = self.problem.cost.beside(g.atom for g in unit.groups)
        for i in sorted({self.owners[a] for a in near if a in self.owners} | {which // 2}):
            for step in (2 * i, 2 * i + 1):
                if step in self.change:
                    del self.ordered[bisect_left(self.ordered, (self.change[step], step))]
            for step in self._find(i):
                insort(self.ordered, (self.change[step], step))
        return total
