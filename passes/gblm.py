"""GBLM: Wanda's score plus the gradient, as a slice's consumers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Gblm:
    """score_i = sum over features j, mean over outputs o, of |W_oj| (X_j + alpha G_oj).

    GBLM-Pruner, 2023, alpha = 100; columns in place of weights, as Wanda-sp. With n examples,
    X_j = sqrt(sum_n ||X_j||_2^2 / n) and G the l2 (or l1) norm of the gradient over single
    examples, as the released code has it. Without `published`, as the paper writes it:
    X_j = ||X_j||_2 over all samples, and G divided by n; the gradient is then weaker by
    n sqrt(n), so that the score is Wanda's.
    """

    name: ClassVar[str] = "gblm"
    alpha: float = 100.0
    norm: int = 2
    published: bool = True

    def __post_init__(self) -> None:
        if self.norm not in (1, 2):
            raise TypeError("norm must be 1 or 2")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that calibration gathers."""
        return ("moments", "weight_squares" if self.norm == 2 else "weight_absolutes")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        over_x, over_g = (ctx.examples ** 0.5, 1) if self.published else (1, ctx.examples)
        for view in ctx.consumers(group):
            gradient = view.gradient(self.needs[1]).double()
            gradient = (gradient.sqrt() if self.norm == 2 else gradient) / over_g
            score = view.moments.norm.unsqueeze(1) / over_x + self.alpha * gradient
            total += view.onto((view.weight.double().abs() * score).mean(1))
        return total
