"""Candidates: allocations drawn about the uniform one, chosen by their loss on renewed norms."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import numpy as np

from spacompiler.errors import SpaError
from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class Candidates:
    """The allocation with the least loss among `count`, batch norms taken anew for each.

    FedTiny's choice of a coarse mask (ICDCS 2023), on one machine: candidates keep
    min(1, r exp(spread z_u)) of unit u, z normal, r met by the budget (the first one is uniform);
    each is run masked, batch norms by the statistics of the batch that they see, and the loss
    over `batches` decides. Statistics of the dense network would tell candidates apart by what
    a moment's adaptation mends.
    """

    name: ClassVar[str] = "candidates"
    by_layer: ClassVar[bool] = True
    count: int = 16
    spread: float = 0.25
    batches: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.count, self.batches) < 1 or self.spread <= 0:
            raise TypeError("count and batches must be at least 1, spread above 0")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit. Raises SpaError where nothing can be measured."""
        if problem.measure is None or not problem.measure.batches:
            raise SpaError("candidates are compared on calibration data and a torch module",
                           fix="give --calibration, or use --allocation uniform")
        draws = np.random.default_rng(self.seed)
        plans = [self._drawn(problem, np.zeros(len(problem.units)))] + [
            self._drawn(problem, self.spread * draws.standard_normal(len(problem.units)))
            for _ in range(self.count - 1)]
        met = [plan for plan in plans if problem.met(plan)] or plans[:1]
        losses = [problem.measure.renewed(problem, plan, self.batches) for plan in met]
        best = min(range(len(met)), key=lambda i: losses[i] if isfinite(losses[i]) else np.inf)
        problem.notes.append(f"{len(met)} candidates: losses {min(losses):.3g} to "
                             f"{max(losses):.3g}, the uniform one {losses[0]:.3g}")
        return met[best]

    @staticmethod
    def _drawn(problem: Problem, logs: np.ndarray) -> dict[str, int]:
        """The counts with these logarithms of shares, but for a factor that meets the budget."""
        shares = dict(zip((u.name for u in problem.units), np.exp(logs), strict=True))

        def at(scale: float) -> dict[str, int]:
            return {u.name: u.nearest(min(1.0, scale * shares[u.name]) * u.size)
                    for u in problem.units}

        near = nearest(problem, at, 0.0, 1 / min(shares.values()), 40)
        return near if problem.met(near) else refine(problem, near)
