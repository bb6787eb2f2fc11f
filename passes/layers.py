"""Allocation by layer: blocks that turn the hidden state more keep more of their slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from typing import ClassVar

import torch

from spacompiler.errors import SpaError
from spacompiler.plan.bisection import nearest
from spacompiler.plan.problem import Problem
from spacompiler.plan.settling import refine


@dataclass(frozen=True)
class CfspLayers:
    """keep_l proportional to sigmoid(I_l - mean I), I_l the summed angle of block l (CFSP).

    CFSP (COLING 2025) sums the angle / pi over all tokens of `tokens` and divides by 10^4 inside
    the sigmoid; ratios above one are drawn back toward the mean.
    """

    name: ClassVar[str] = "cfsp-layers"
    by_layer: ClassVar[bool] = True
    strength: float = 1.0
    tokens: int = 128 * 1024

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        angle = {u: a * self.tokens for u, (a, _) in measured(problem).items()}
        mean = sum(angle.values()) / len(angle)
        weight = {u: 1 / (1 + exp(-self.strength * (a - mean) / 1e4)) for u, a in angle.items()}
        level = sum(weight.values()) / len(weight)

        def at(keep: float) -> dict[str, float]:
            ratio = {u: keep * w / level for u, w in weight.items()}
            while max(ratio.values()) > 1:
                ratio = {u: keep + (r - keep) / 1.05 for u, r in ratio.items()}
                if max(abs(r - keep) for r in ratio.values()) < 1e-3:
                    break
            return ratio

        return fit(problem, at)


@dataclass(frozen=True)
class AdaptLayers:
    """s_l grows in small steps by delta - amplitude I_l, I_l = -cos centred, divided by max |.|.

    Adapt-Pruner (arXiv 2502.03460): blocks that change the hidden state least lose most; sparsity
    s_l stays within [0, 1). `amplitude` is the released default, over `rounds` steps.
    """

    name: ClassVar[str] = "adapt-layers"
    by_layer: ClassVar[bool] = True
    amplitude: float = 0.02
    rounds: int = 50

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        raw = {u: -cosine for u, (_, cosine) in measured(problem).items()}
        mean = sum(raw.values()) / len(raw)
        widest = max(abs(v - mean) for v in raw.values()) or 1.0
        importance = {u: (v - mean) / widest for u, v in raw.items()}

        def at(keep: float) -> dict[str, float]:
            sparsity = dict.fromkeys(importance, 0.0)
            for _ in range(self.rounds):
                for u, i in importance.items():
                    step = (1 - keep) / self.rounds - self.amplitude * i
                    sparsity[u] = min(max(sparsity[u] + step, 0.0), 0.99)
            return {u: 1 - s for u, s in sparsity.items()}

        return fit(problem, at)


@dataclass(frozen=True)
class EcoLayers:
    """Blocks keep the share of their weights whose |w g| is above one threshold, g by forward
    passes alone: two a block, over `batches` (ECoFLaP, ICLR 2024). No block loses more than `cap`
    beyond the mean.
    """

    name: ClassVar[str] = "eco-layers"
    by_layer: ClassVar[bool] = True
    step: float = 1e-3
    batches: int = 2
    cap: float = 0.2

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        if problem.measure is None:
            raise SpaError("this allocation needs measurements on a torch module",
                           fix="use --allocation uniform or global")
        found = problem.measure.salience(problem, step=self.step, batches=self.batches)
        every = torch.cat(list(found.values()))

        def at(keep: float) -> dict[str, float]:
            threshold = every.kthvalue(max(1, int((1 - keep) * len(every)))).values
            return {u: min(max(float((s > threshold).double().mean()), keep - self.cap),
                           keep + self.cap, 1.0) for u, s in found.items()}

        return fit(problem, at)


def measured(problem: Problem) -> dict[str, tuple[float, float]]:
    """Return what the problem's measurements say of the blocks; SpaError if it has none."""
    if problem.measure is None:
        raise SpaError("this allocation needs measurements on a torch module",
                       fix="use --allocation uniform or global")
    found: dict[str, tuple[float, float]] = problem.measure.blocks(problem)
    return found


def fit(problem: Problem, at: Callable[[float], dict[str, float]]) -> dict[str, int]:
    """Bisect the mean share that stays until the budget holds; `at(share)` gives each unit's."""
    def counts(share: float) -> dict[str, int]:
        ratio = at(share)
        return {u.name: u.nearest(ratio.get(u.name, share) * u.size) for u in problem.units}

    near = nearest(problem, counts, 0.0, 1.0, 30)
    return near if problem.met(near) else refine(problem, near)
