"""Counts that hold under several limits at once: priced together, then filled up.

Each limit is a cost of its own with the amount that may stay. A plan is brought under all of them
by the steps down that lose least for what they relieve, and then takes the steps up that gain most
for what they use of what is left, until no step fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .bisection import bisect
from .problem import Limit, Problem, Unit

Kept = dict[str, int]
NOTHING = 1e-12


def every(problem: Problem) -> list[Limit]:
    """Return all limits of a problem, its target first."""
    own = Limit(problem.metric, problem.cost, problem.target, problem.dense)
    return [own, *problem.limits]


def fitted(problem: Problem, kept: Mapping[str, int]) -> Kept:
    """Return counts near to some that hold under all limits, as large as single steps make them.

    What cannot be brought under a limit is returned as far as it came.
    """
    filling = _Filling(problem, every(problem), dict(kept))
    most = 10 * sum(len(u.legal) for u in problem.units)
    while most and filling.over() and filling.down():
        most -= 1
    while most and filling.up():
        most -= 1
    problem.price(filling.kept)
    return filling.kept


@dataclass
class _Filling:
    """Single steps of units under several limits, all priced at `kept`."""

    problem: Problem
    limits: Sequence[Limit]
    kept: Kept

    def __post_init__(self) -> None:
        for limit in self.limits:
            limit.price(self.problem, self.kept)

    def over(self) -> bool:
        """Whether some limit is broken."""
        return any(limit.over > 0 for limit in self.limits)

    def down(self) -> bool:
        """Take the step that loses least for what it relieves the worst limit of, if any does."""
        over = [limit.over for limit in self.limits]
        worst = self.limits[over.index(max(over))]
        steps = [(lost / relief, unit, to) for unit, to, lost in self._steps(-1)
                 if (relief := -worst.cost.change(unit.counts(to))) > 0]
        return self._take(steps)

    def up(self) -> bool:
        """Take the step that gains most for what it uses of what limits have left, if one fits."""
        steps = []
        for unit, to, gained in self._steps(1):
            uses = [(limit.cost.change(unit.counts(to)), limit.left) for limit in self.limits]
            if all(use <= left for use, left in uses):
                part = sum(use / max(left, 1) for use, left in uses)
                steps.append((-gained / (part + NOTHING), unit, to))
        return self._take(steps)

    def _steps(self, by: int) -> Iterator[tuple[Unit, int, float]]:
        """Each unit's next count and what of its losses that changes."""
        for unit in self.problem.units:
            have = self.kept[unit.name]
            at = unit.legal.index(have) + by
            if 0 <= at < len(unit.legal):
                to = unit.legal[at]
                yield unit, to, abs(float(unit.losses[to] - unit.losses[have])) + NOTHING

    def _take(self, steps: Sequence[tuple[float, Unit, int]]) -> bool:
        if not steps:
            return False
        _, unit, to = min(steps, key=lambda step: step[0])
        self.kept[unit.name] = to
        for limit in self.limits:
            limit.cost.set(unit.counts(to))
        return True


def mixes(problem: Problem) -> list[tuple[float, ...]]:
    """Return weights of a problem's limits that prices are mixed by: each alone, all alike, and
    half way between."""
    count = len(problem.limits) + 1
    alike = (1 / count,) * count
    alone = [tuple(float(i == j) for j in range(count)) for i in range(count)]
    between = [tuple((a + b) / 2 for a, b in zip(one, alike, strict=True)) for one in alone]
    return list(dict.fromkeys([alike, *alone, *between]))


def priced(problem: Problem, mix: Sequence[float]) -> Kept:
    """Return the counts with the least loss plus price times cost that hold under all limits.

    The cost is the mean of the limits' shares of the dense costs, weighted by `mix`; its price is
    bisected: the relaxed integer program, solved by its dual.
    """
    limits, full = every(problem), problem.full()
    for limit in limits:
        limit.price(problem, full)
    tables = {u.name: [(k, float(u.losses[k]), sum(
        w * limit.cost.change(u.counts(k)) / limit.dense
        for w, limit in zip(mix, limits, strict=True))) for k in u.legal]
        for u in problem.units}

    def at(price: float) -> Kept:
        return {name: min(rows, key=lambda row: row[1] + price * row[2])[0]
                for name, rows in tables.items()}

    def over(price: float) -> bool:
        kept = at(price)
        return any(limit.price(problem, kept) > limit.amount for limit in limits)

    high = 1e-9
    while over(high) and high < 1e15:
        high *= 8
    return at(bisect(over, 0.0, high, 50)[1])
