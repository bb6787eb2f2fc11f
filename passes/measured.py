"""Measured allocation: counts moved by what the pruned and repaired network says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from spacompiler.errors import SpaError
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.plan.bisection import bisect
from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import refine
from spacompiler.trials.sensitivity import Change

ATTEMPTS = 12
Changes = Mapping[tuple[str, int], Change]


@dataclass(frozen=True)
class Measured:
    """Allocate by the curves, then move counts where the pruned network itself gains.

    A curve foresees a group's loss with all else whole; losses of many groups do not add. In each
    round the network is pruned and repaired in memory, and what other counts near by would do to
    its divergence from the dense one is measured on the first `batches` (two backward passes, see
    `spacompiler.sensitivity`; half of them are the model's own text where it wrote some). The moves
    with the least sum of slope + `caution` · curvature under the target are tried, and, as moves
    act on each other, so are those of less caution while that is better, or of more until it is,
    without large steps down if these do harm.
    """

    name: ClassVar[str] = "measured"
    by_layer: ClassVar[bool] = True
    rounds: int = 4
    batches: int = 6
    caution: float = 4.0
    tries: int = 5
    reach: tuple[float, ...] = (1 / 48, 1 / 24, 1 / 12, 1 / 6)

    def __post_init__(self) -> None:
        if min(self.rounds, self.batches, self.tries) < 1 or self.caution <= 0 or not self.reach:
            raise TypeError("rounds, batches, tries at least 1; caution above 0; some reach")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        if problem.measure is None:
            raise SpaError("measured allocation needs a torch module and calibration data",
                           fix="use --allocation global")
        changed = partial(problem.measure.changes, problem, batches=self.batches)
        kept, caution, bold = GlobalRanking(checked=False).allocate(problem), self.caution, True
        for _ in range(self.rounds):
            moves = {u.name: near(u, kept[u.name], self.reach) for u in problem.units}
            changes, lost = changed(kept, moves)
            made, caution, bold = self._best(
                problem, lambda plan: changed(plan, {})[1], kept, changes, lost, caution, bold)
            if made == kept:
                break
            kept = made
        return kept

    def _best(self, problem: Problem, measured: Callable[[dict[str, int]], float],
              kept: dict[str, int], changes: Changes, least: float, caution: float,
              bold: bool) -> tuple[dict[str, int], float, bool]:
        """The least divergence among some plans, each measured; its caution and boldness.

        Half of the caution as long as that is better. If the first one is not: without the steps
        down that go beyond `reach` (there is no smaller one), then with more caution until it is.
        """
        trusted = self._trusted(problem, kept, changes)
        best, found, step = kept, caution, 0.5
        known = {tuple(sorted(kept.items())): least}
        for _ in range(self.tries):
            made = moved(problem, kept, changes if bold else trusted, caution)
            plan = tuple(sorted(made.items()))
            lost = known[plan] = known[plan] if plan in known else measured(made)
            if lost < least:
                best, least, found = made, lost, caution
                if step > 1:
                    break
            elif best is not kept:
                break
            elif bold and trusted:
                bold = False
                continue
            else:
                step = 2.0
            caution *= step
        return best, found, bold

    def _trusted(self, problem: Problem, kept: Mapping[str, int], changes: Changes) -> Changes:
        """Moves but for steps down beyond reach; none at all if no step down is left."""
        sizes = {u.name: u.size for u in problem.units}
        some = {(unit, k): change for (unit, k), change in changes.items()
                if kept[unit] - k <= max(self.reach) * sizes[unit]}
        return some if any(k < kept[unit] for unit, k in some) else {}


def near(unit: Unit, kept: int, reach: Iterable[float]) -> list[int]:
    """Return legal counts so many shares of the size away, on both sides; the next one at least."""
    at = unit.legal.index(kept)
    wanted = {unit.nearest(kept + sign * share * unit.size) for share in reach for sign in (-1, 1)}
    return sorted((wanted | set(unit.legal[max(at - 1, 0): at + 2])) - {kept})


def moved(problem: Problem, kept: Mapping[str, int], changes: Changes,
          caution: float) -> dict[str, int]:
    """Return counts after the moves with the least sum of changes under the target.

    A price on cost is bisected. Costs add up to first order only, so the price of the result is met
    in several attempts; the one that is nearest to the target counts.
    """
    start = problem.price(kept)
    options = {u.name: [(kept[u.name], 0.0, 0.0)] + [
        (k, c.slope + caution * c.curvature, float(problem.cost.change(u.counts(k))))
        for (name, k), c in changes.items() if name == u.name] for u in problem.units}
    wanted = problem.target - start
    tried = []
    for i in range(ATTEMPTS):
        made = _cheapest(options, wanted)
        miss = problem.price(made) - problem.target
        tried.append((abs(miss), i, made))
        if abs(miss) <= problem.tolerance * problem.dense / 20:
            break
        wanted -= miss if i < ATTEMPTS // 2 else miss / 2
    best = min(tried)[2]
    return best if problem.met(best) else refine(problem, best)


def _cheapest(options: Mapping[str, list[tuple[int, float, float]]],
              wanted: float) -> dict[str, int]:
    """Return the counts with the least total of change + price · cost that cost `wanted` more."""

    def picked(price: float) -> list[tuple[int, float, float]]:
        return [min(some, key=lambda o: o[1] + price * o[2]) for some in options.values()]

    def over(price: float) -> bool:
        return sum(o[2] for o in picked(price)) > wanted

    low, high = 0.0, 1e-12
    while over(high) and high < 1e12:
        high *= 4
    high = bisect(over, low, high, 60)[1]
    return dict(zip(options, (o[0] for o in picked(high)), strict=True))
