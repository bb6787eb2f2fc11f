"""Counts that hold under several limits at once: priced together, then filled up.

Each limit is a cost of its own with the amount that may stay. A plan is brought under all of them
by the steps down that lose least for what they relieve, and then takes the steps up that gain most
for what they use of what is left, until no step fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .bisection import bisect
from .problem import Limit, Problem, Unit

Kept = dict[str, int]


def every(problem: Problem) -> list[Limit]:
    """Return all limits of a problem, its target first."""
    own = Limit(problem.metric, problem.cost, problem.target, problem.dense)
    return [own, *problem.limits]


def fitted(problem: Problem, kept: Mapping[str, int]) -> Kept:
    """Return counts near to some that hold under all limits, as large as single steps make them.

    What cannot be brought under a limit is returned as far as it came.
    """
    made, limits = dict(kept), every(problem)
    for limit in limits:
        limit.price(problem, made)
    for _ in range(10 * sum(len(u.legal) for u in problem.units)):
        over = [limit.over for limit in limits]
        if max(over) <= 0:
            break
        if not _step(problem, made, limits, over.index(max(over)), -1):
            break
    while _step(problem, made, limits, 0, 1):
        pass
    problem.price(made)
    return made


def _step(problem: Problem, kept: Kept, limits: Sequence[Limit], worst: int, by: int) -> bool:
    """Take the best step of one unit up or down; False if there is none.

    Down: the least loss for what the worst limit is relieved of. Up: the most gained for what is
    used of what each limit has left, if all hold with it.
    """
    best: tuple[float, Unit, int] | None = None
    for unit in problem.units:
        at = unit.legal.index(kept[unit.name]) + by
        if not 0 <= at < len(unit.legal):
            continue
        to = unit.legal[at]
        changes = [limit.cost.change(unit.counts(to)) for limit in limits]
        lost = abs(float(unit.losses[to] - unit.losses[kept[unit.name]])) + 1e-12
        if by < 0:
            rate = lost / max(-changes[worst], 1e-9)
        else:
            if any(c > limit.left for c, limit in zip(changes, limits, strict=True)):
                continue
            rate = -lost / (sum(c / max(limit.left, 1) for c, limit in zip(
                changes, limits, strict=True)) + 1e-12)
        if (by > 0 or changes[worst] < 0) and (best is None or rate < best[0]):
            best = rate, unit, to
    if best is None:
        return False
    _, unit, to = best
    kept[unit.name] = to
    for limit in limits:
        limit.cost.set(unit.counts(to))
    return True


def priced(problem: Problem, mix: float) -> Kept:
    """Return the counts with the least loss plus price times cost that hold under all limits.

    The cost is the mean of the limits' shares, the last one weighted by `mix`, the first by the
    rest (those between by halves); its price is bisected.
    """
    limits = every(problem)
    weights = [1 - mix, *(0.5 for _ in limits[1:-1]), mix][: len(limits)] \
        if len(limits) > 1 else [1.0]
    full = problem.full()
    for limit in limits:
        limit.price(problem, full)
    tables = {u.name: [(k, float(u.losses[k]), sum(
        w * limit.cost.change(u.counts(k)) / limit.dense
        for w, limit in zip(weights, limits, strict=True))) for k in u.legal]
        for u in problem.units}

    def at(price: float) -> Kept:
        return {name: min(rows, key=lambda row: row[1] + price * row[2])[0]
                for name, rows in tables.items()}

    def over(price: float) -> bool:
        kept = at(price)
        return max(limit.price(problem, kept) - limit.amount for limit in limits) > 0

    high = 1e-9
    while over(high) and high < 1e15:
        high *= 8
    return at(bisect(over, 0.0, high, 50)[1])
