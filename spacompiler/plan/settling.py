"""Single steps that bring a cost to its target, the best one first, in time linear in their number.

Every unit may keep the next smaller or the next larger legal count; what each such step changes
is kept in order, and after a step only terms are priced anew that others share with it: a stream
that all of a network reads has a term with each of its layers.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping

from ..axes.expressions import Atom
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

    def _counts(self, step: int) -> dict[Atom, int]:
        """The counts that a step would lead to."""
        unit = self.problem.units[step // 2]
        at = unit.legal.index(self.kept[unit.name])
        return unit.counts(unit.legal[at + (1 if step % 2 else -1)])

    def nearest(self, wanted: float) -> int | None:
        """Return the step whose change is nearest to the wanted one, the first of equals."""
        at = bisect_left(self.ordered, (wanted,))
        found = [self.ordered[at]] if at < len(self.ordered) else []
        if at:
            found.append(self.ordered[bisect_left(self.ordered, (self.ordered[at - 1][0],))])
        return min(((abs(change - wanted), step) for change, step in found),
                   default=(0, None))[1]

    def take(self, which: int) -> int:
        """Take a step, price what others share with it anew, and return the new total."""
        own, cost = which // 2, self.problem.cost
        counts, unit = self._counts(which), self.problem.units[own]
        shared = self._shared(own)
        before = {step: cost.change(self._counts(step), terms) for step, terms in shared.items()}
        total = cost.set(counts)
        for step, terms in shared.items():
            self._put(step, self.change[step] - before[step] +
                      cost.change(self._counts(step), terms))
        for step in (2 * own, 2 * own + 1):
            self._drop(step)
        self.kept[unit.name] = next(iter(counts.values()))
        for step in self._find(own):
            insort(self.ordered, (self.change[step], step))
        return total

    def _shared(self, own: int) -> dict[int, list[int]]:
        """The terms that a unit has in common with each step of another."""
        cost, found = self.problem.cost, dict[int, list[int]]()
        for term in cost.touched(g.atom for g in self.problem.units[own].groups):
            for i in {self.owners[a] for a in cost.mentioned(term) if a in self.owners} - {own}:
                for step in (2 * i, 2 * i + 1):
                    if step in self.change:
                        found.setdefault(step, []).append(term)
        return found

    def _put(self, step: int, change: int) -> None:
        if change != self.change[step]:
            self._drop(step)
            self.change[step] = change
            insort(self.ordered, (change, step))

    def _drop(self, step: int) -> None:
        if step in self.change:
            del self.ordered[bisect_left(self.ordered, (self.change[step], step))]
