"""Counts under a budget, from one order of all slices: a threshold that meets the cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

import numpy as np

from ..axes.choices import Choice, Choices
from ..groups.solution import Group
from ..plan.problem import Problem, Unit, check_met
from ..plan.settling import refine

Order = Mapping[str, np.ndarray]


class Projection:
    """Brings an order of slices, comparable across groups, to counts that meet a problem's target.

    Slices above one threshold stay; counts are the nearest legal ones. Units of several groups, and
    groups under outer slices, keep equal counts: their n-th best slices are averaged.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._legal = {u.name: np.asarray(u.legal) for u in problem.units}

    def counts(self, order: Order, *, share: float | None = None,
               exact: bool = False) -> dict[str, int]:
        """Return kept slices by unit, for a share of the dense cost in place of the target.

        `exact` mends what steps leave of the target.

        Raises TargetError if it asks for what cannot be met.
        """
        levels = {u.name: _levels(u, order) for u in self.problem.units}
        every = np.unique(np.concatenate([*levels.values()]))

        def kept(i: int) -> dict[str, int]:
            return {name: self._nearest(name, int((v >= every[i]).sum()))
                    for name, v in levels.items()}

        target = self.problem.target if share is None else share * self.problem.dense
        at = bisect_right(range(len(every)), -target,
                          key=lambda i: -self.problem.price(kept(i)))
        tries = [kept(i) for i in {max(at - 1, 0), min(at, len(every) - 1)}]
        best = min(tries, key=lambda k: abs(self.problem.price(k) - target))
        if exact and not self.problem.met(best):
            best = refine(self.problem, best)
        if exact:
            check_met(self.problem, best)
        return best

    def _nearest(self, name: str, wanted: int) -> int:
        legal = self._legal[name]
        return int(legal[np.abs(legal - wanted).argmin()])

    def by_group(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Return the count of each group."""
        return {g.name: kept[u.name] for u in self.problem.units for g in u.groups}


def _levels(unit: Unit, order: Order) -> np.ndarray:
    """The n-th best slices of a unit, best first: (size,)."""
    rows = np.concatenate([order[g.name].reshape(-1, unit.size) for g in unit.groups])
    found: np.ndarray = -np.sort(-rows.astype(float), axis=-1).mean(0)
    return found


def tables(groups: list[Group], order: Order, counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return, by group, which slices stay: the best of each outer slice, ties to the lower index.
    """
    made = {}
    for group in groups:
        rows = order[group.name].reshape(-1, group.size)
        best = np.argsort(-rows, axis=-1, kind="stable")[:, :counts[group.name]]
        table = np.zeros(rows.shape, dtype=bool)
        np.put_along_axis(table, best, True, axis=-1)
        made[group.name] = table.reshape(group.shape)
    return made


def choices(groups: list[Group], kept: Mapping[str, np.ndarray]) -> Choices:
    """Return tables of what stays as choices over atoms, without those that keep all."""
    return {g.atom: Choice(kept[g.name], g.outers) for g in groups if not kept[g.name].all()}
