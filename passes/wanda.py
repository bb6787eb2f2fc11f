"""Wanda, structured: a slice matters as much as its consumers' weights times their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Wanda:
    """score_i = sum over the slice's features j of mean over outputs o of |W_oj| ||X_j||_2.

    X is what the consumer reads, W its weight; consumers add up. Wanda-sp: Wanda (ICLR 2024) with
    columns instead of weights, as FLAP (AAAI 2024) compares with it.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[tuple[str, ...]] = ("moments",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return sum((view.onto(view.weight.abs().mean(1, dtype=torch.float64) * view.moments.norm)
                    for view in ctx.consumers(group)), torch.zeros(group.shape))
