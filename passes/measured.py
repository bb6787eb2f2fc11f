"""Measured allocation: error curves corrected by what each group costs once all are pruned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import ClassVar

from spacompiler.allocation import Problem
from spacompiler.errors import SpaError

from .global_ranking import GlobalRanking


@dataclass(frozen=True)
class Measured:
    """Allocate, prune and repair in memory, measure, scale the curves, and allocate again.

    A curve foresees a group's loss with all else whole. After a round, the loss of the jointly
    pruned and repaired network, on the first `batches`, is differentiated by the size of each
    group's error, and its curve scaled by measured / foreseen (moved by `trust` of that in the
    logarithm, within `limit`).
    The allocation with the least measured loss is returned.
    """

    name: ClassVar[str] = "measured"
    rounds: int = 3
    trust: float = 0.7
    limit: float = 20.0
    batches: int = 4

    def __post_init__(self) -> None:
        if min(self.rounds, self.batches) < 1 or not 0 < self.trust <= 1 or self.limit <= 1:
            raise TypeError("rounds, batches at least 1; trust in (0, 1]; limit above 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        if problem.measure is None:
            raise SpaError("measured allocation needs a torch module and calibration data",
                           fix="use --allocation global")
        foreseen = {u.name: u.losses for u in problem.units}
        factor = dict.fromkeys(foreseen, 1.0)
        tried = []
        for i in range(self.rounds + 1):
            units = tuple(replace(u, losses=foreseen[u.name] * factor[u.name])
                          for u in problem.units)
            kept = GlobalRanking().allocate(replace(problem, units=units))
            shares, loss = problem.measure.shares(problem, kept, self.batches)
            tried.append((loss, i, kept))
            own = {u: float(foreseen[u][k]) for u, k in kept.items() if foreseen[u][k] > 0}
            ratio = {u: shares[u] / lost for u, lost in own.items()}
            usual = median(max(r, 0.0) for r in ratio.values()) or 1.0
            for u, r in ratio.items():
                seen = min(max(r / usual, 1 / self.limit), self.limit)
                factor[u] *= (seen / factor[u]) ** self.trust
        return min(tried)[2]
