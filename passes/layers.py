"""Allocation by layer: blocks that turn the hidden state more keep more of their slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, exp
from typing import ClassVar

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
    """s_l(t+1) = clip(s_l(t) + step - amplitude I_l(t)), I_l = -cos centred, divided by max |.|.

    Adapt-Pruner (arXiv 2502.03460): in steps of `step`, until the budget is met, blocks that
    change the hidden state least lose most. I_l(t) is measured anew after each step, on the
    network without what went before; s_l stays within [0, 0.99], and int((1 - s_l) size) slices
    stay. Of the last step as much is taken as meets the budget. Scores are those of the dense
    network (the released code takes them anew, too: `--schedule progressive` does).
    """

    name: ClassVar[str] = "adapt-layers"
    by_layer: ClassVar[bool] = True
    amplitude: float = 0.02
    step: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.step <= 1:
            raise TypeError("step must be above 0 and at most 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        lost = {u.name: 0.0 for u in problem.units}
        kept = problem.full()
        for _ in range(ceil(1 / self.step)):
            then = self._next(lost, measured(problem, kept))
            if then == lost or problem.price(counts(problem, then)) <= problem.target:
                break
            lost, kept = then, counts(problem, then)

        def at(part: float) -> dict[str, int]:
            return counts(problem, {u: s + part * (then[u] - s) for u, s in lost.items()})

        near = nearest(problem, at, 0.0, 1.0, 30, rising=False)
        return near if problem.met(near) else refine(problem, near)

    def _next(self, lost: dict[str, float], found: dict[str, tuple[float, float]]
              ) -> dict[str, float]:
        """Sparsities after one more step; units outside of blocks lose the mean step."""
        raw = {u: -cosine for u, (_, cosine) in found.items()}
        mean = sum(raw.values()) / len(raw)
        widest = max(abs(v - mean) for v in raw.values()) or 1.0
        return {u: min(max(s + self.step - self.amplitude * (raw.get(u, mean) - mean) / widest,
                           0.0), 0.99) for u, s in lost.items()}


@dataclass(frozen=True)
class EcoLayers:
    """keep_l = (1 - cap) n_l, the rest dealt out in proportion to g_l, at most n_l (ECoFLaP, ICLR
    2024); n_l is the size of the block, and g_l its slope, by forward passes alone.

    g_l = sum over the block's matrices W and over examples of |L(W + step z) - L(W - step z)| /
    (2 step), z normal, drawn anew each time: two passes for each of `examples` and each matrix,
    the costs of the released code, which a file for ONNX Runtime can be asked for as well. No
    block loses more than `cap`.
    """

    name: ClassVar[str] = "eco-layers"
    by_layer: ClassVar[bool] = True
    on_files: ClassVar[bool] = True
    step: float = 1e-3
    examples: int = 32
    cap: float = 0.7

    def __post_init__(self) -> None:
        if self.step <= 0 or self.examples < 1 or not 0 < self.cap <= 1:
            raise TypeError("step above 0, examples at least 1, cap above 0 and at most 1")

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit."""
        if problem.measure is None:
            raise SpaError(NEEDS, fix="use --allocation uniform or global")
        found = problem.measure.slopes(problem, step=self.step, examples=self.examples)

        def at(keep: float) -> dict[str, float]:
            share = filled({b: s for b, (s, _, _) in found.items()},
                           {b: n for b, (_, n, _) in found.items()}, keep, self.cap)
            return {u: share[b] for b, (_, _, units) in found.items() for u in units}

        return fit(problem, at)


def filled(scores: Mapping[str, float], sizes: Mapping[str, int], keep: float,
           cap: float) -> dict[str, float]:
    """Return the share of each block that stays: 1 - cap, then in proportion to scores, at most 1.

    What a full block cannot take is dealt out among the others until `keep` of all stays.

    >>> filled({"a": 1.0, "b": 3.0}, {"a": 10, "b": 10}, 0.5, 1.0)
    {'a': 0.25, 'b': 0.75}
    """
    stays = {b: (1 - cap) * n for b, n in sizes.items()}
    open_, wanted = {b for b in sizes if scores[b] > 0}, keep * sum(sizes.values())
    while open_ and (left := wanted - sum(stays.values())) > 1e-9 * wanted:
        total = sum(scores[b] for b in open_)
        stays |= {b: stays[b] + left * scores[b] / total for b in open_}
        open_ = {b for b in open_ if stays[b] < sizes[b]}
        stays = {b: min(s, float(sizes[b])) for b, s in stays.items()}
    return {b: s / sizes[b] for b, s in stays.items()}


NEEDS = "this allocation needs measurements on a torch module"
"""What is said where a problem has none."""


def measured(problem: Problem, kept: Mapping[str, int] | None = None) -> dict[
        str, tuple[float, float]]:
    """Return what the problem's measurements say of the blocks; SpaError if it has none."""
    if problem.measure is None:
        raise SpaError(NEEDS, fix="use --allocation uniform or global")
    found: dict[str, tuple[float, float]] = problem.measure.blocks(problem, kept)
    return found


def counts(problem: Problem, lost: Mapping[str, float]) -> dict[str, int]:
    """Return the counts that sparsities of units leave, rounded down to whole slices first."""
    return {u.name: u.nearest(int((1 - lost[u.name]) * u.size + 1e-9)) for u in problem.units}


def fit(problem: Problem, at: Callable[[float], dict[str, float]]) -> dict[str, int]:
    """Bisect the mean share that stays until the budget holds; `at(share)` gives each unit's."""
    def kept(share: float) -> dict[str, int]:
        ratio = at(share)
        return {u.name: u.nearest(ratio.get(u.name, share) * u.size) for u in problem.units}

    near = nearest(problem, kept, 0.0, 1.0, 30)
    return near if problem.met(near) else refine(problem, near)
