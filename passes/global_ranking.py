"""Global allocation: take from whichever unit loses least importance per unit of cost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import ClassVar

import numpy as np

from spacompiler.passes.uniform import Uniform
from spacompiler.plan.problem import Measured, Problem, Unit
from spacompiler.plan.settling import refine

FLOOR = 0.5
"""What a unit keeps at least of its share under `uniform`, where losses are estimates."""
LEAST = 1e-3
"""The share of a unit's importance below which losing more costs no more."""
PARTS = (0.25, 0.5, 0.75, 1.0)
"""How far the plans that are tried go from the uniform one to the ranking's."""
BATCHES = 4
NEARER = 0.75
"""The share of the uniform plan's divergence at which another is better without more evidence."""


@dataclass(frozen=True)
class GlobalRanking:
    """Greedy: the next step is the one with the least loss per cost saved, one unit for all groups.

    Costs are read from the graph as it shrinks (lazily: a step's price is checked again when it
    comes up). The loss is what the criterion says, where it is exact (`curvature`). Where it is a
    first-order estimate (`taylor`, `snip`, ...) a unit that has lost the share s of its importance
    T has lost -T log(1 - s): what is left of a layer is worth more, the less there is. Where scores
    of groups are in no common unit, ranks within groups stand for them, and a note says so. But
    for exact losses every unit keeps half of what it would keep under `uniform`.

    With `checked`, plans between the uniform one and this one are tried on calibration data, each
    masked, and repaired if a repair is to follow. Taken is the one whose likeliest classes are the
    dense network's most often, of several the one that diverges least, but no other than the
    uniform one unless it is better beyond the error of such a count, or as good in it and diverges
    by three quarters at most.
    """

    name: ClassVar[str] = "global"
    checked: bool = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        if problem.losses == "unlike":
            problem.notes.append(
                f"scores of {problem.criterion or 'this criterion'} are in no common unit: the "
                "ranking goes by their ranks within each group")
        kept = _ranked(problem)
        if not self.checked or problem.measure is None or not problem.on_data:
            return kept
        return _trusted(problem, problem.measure, kept)


def _ranked(problem: Problem) -> dict[str, int]:
    """The greedy counts."""
    problem = replace(problem, units=tuple(_costed(problem)))
    kept = problem.full()
    total = problem.price(kept)
    units = {u.name: u for u in problem.units}
    heap = [(_rate(problem, u, u.legal[-1]), u.name) for u in problem.units if len(u.legal) > 1]
    heapq.heapify(heap)
    while heap and total > problem.target:
        _, name = heapq.heappop(heap)
        unit = units[name]
        rate = _rate(problem, unit, kept[name])
        if heap and rate > heap[0][0]:
            heapq.heappush(heap, (rate, name))
            continue
        kept[name] = unit.legal[unit.legal.index(kept[name]) - 1]
        total = problem.cost.set(unit.counts(kept[name]))
        if kept[name] > unit.legal[0]:
            heapq.heappush(heap, (_rate(problem, unit, kept[name]), name))
    return kept if problem.met(kept) else refine(problem, kept)


def _costed(problem: Problem) -> list[Unit]:
    """The units with the losses that are ranked, and with the counts that they may keep."""
    if problem.losses == "exact":
        return list(problem.units)
    least = Uniform().allocate(problem)
    return [replace(u, losses=_barred(u, problem.losses == "unlike"),
                    legal=tuple(k for k in u.legal if k >= FLOOR * least[u.name]))
            for u in problem.units]


def _barred(unit: Unit, by_rank: bool) -> np.ndarray:
    """-T log(1 - s) by the number of slices that stay; ranks, and T = 1, if scores are unlike."""
    size = len(unit.losses) - 1
    levels = np.arange(size, 0, -1) / size if by_rank else np.clip(unit.levels, 0.0, None)
    kept = np.concatenate([[0.0], np.cumsum(levels)])
    total = kept[-1] or 1.0
    whole = 1.0 if by_rank else total * len(unit.groups) * prod(unit.groups[0].shape[:-1])
    return np.asarray(-whole * np.log(np.clip(kept / total, LEAST, 1.0)))


def _rate(problem: Problem, unit: Unit, at: int) -> float:
    """Importance lost per cost saved by the unit's next step down."""
    below = unit.legal[unit.legal.index(at) - 1]
    saved = -problem.cost.change(unit.counts(below))
    lost = float(unit.losses[below] - unit.losses[at])
    return lost / saved if saved > 0 else float("inf")


def _trusted(problem: Problem, measure: Measured, ranked: dict[str, int]) -> dict[str, int]:
    """Return the best of some counts between the uniform ones and these, as measured."""
    start = Uniform().allocate(problem)
    plans = [start]
    for part in PARTS:
        made = {u.name: u.nearest(start[u.name] + part * (ranked[u.name] - start[u.name]))
                for u in problem.units}
        made = made if problem.met(made) else refine(problem, made)
        if made not in plans and problem.met(made):
            plans.append(made)
    if len(plans) == 1:
        return plans[0] if problem.met(plans[0]) else ranked
    found = [measure.fidelity(problem, plan, BATCHES) for plan in plans]
    (before, far, rows), better = found[0], [0]
    error = (before * (1 - before) / max(rows, 1)) ** 0.5
    better += [i for i, (same, apart, _) in enumerate(found) if i and isfinite(apart) and (
        same > before + error or (same >= before and apart <= NEARER * far))]
    best = min(better, key=lambda i: (not i, -found[i][0], found[i][1]))
    (after, near, _) = found[best]
    problem.notes.append(
        ("global allocation: uniform counts are as good" if best == 0 else
         "global allocation: better than uniform counts")
        + f" (the dense network's likeliest class in {after:.1%}, {before:.1%} with uniform ones; "
        f"divergence {near:.3g} and {far:.3g})")
    return plans[best]
