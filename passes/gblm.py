"""GBLM: Wanda's score plus the gradient, as a slice's consumers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Gblm:
    """score_i = sum over features j, mean over outputs o, of |W_oj| (||X_j||_2 + alpha G_oj).

    G is the l2 (or l1) norm of the gradient over single examples, divided by their number.
    GBLM-Pruner, 2023, alpha = 100; columns in place of weights, as Wanda-sp.
    """

    name: ClassVar[str] = "gblm"
    alpha: float = 100.0
    norm: int = 2

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
        for view in ctx.consumers(group):
            gradient = view.gradient(self.needs[1]).double()
            gradient = (gradient.sqrt() if self.norm == 2 else gradient) / ctx.examples
            score = view.moments.norm.unsqueeze(1) + self.alpha * gradient
            total += view.onto((view.weight.double().abs() * score).mean(1))
        return total
