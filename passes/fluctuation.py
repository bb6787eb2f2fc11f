"""Fluctuation: a slice matters as much as its consumers' inputs vary; a bias repairs their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.evidence.statistics import View
from spacompiler.groups.solution import Group

METRICS = ("IFV", "WIFV", "WIFN")


@dataclass(frozen=True)
class Fluctuation:
    """FLAP (AAAI 2024): sums over the slice's features j and over consumers (input X, weight W).

    IFV_j = Var(X_j); WIFV_j = Var(X_j) ||W_:j||_2^2, the error that is left once a bias has
    repaired the mean, exact for one column; WIFN_j = mean_o |W_oj| ||X_j||_2.

    With `published`, Var is the running value of the released code, which sums over positions and
    weighs examples unevenly, and `head` groups are squared feature by feature, as it does for
    attention but not for MLPs.
    """

    name: ClassVar[str] = "fluctuation"
    metric: str = "WIFV"
    published: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TypeError(f"metric must be one of {', '.join(METRICS)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that calibration gathers."""
        return ("fluctuation",) if self.published and self.metric != "WIFN" else ("moments",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        power = 2 if self.published and group.role == "head" else 1
        return sum((view.onto(self._features(view).pow(power)) for view in ctx.consumers(group)),
                   torch.zeros(group.shape))

    def _features(self, view: View) -> torch.Tensor:
        weight = view.weight.double()
        if self.metric == "WIFN":
            return weight.abs().mean(1) * view.moments.norm
        varies = view.fluctuation.value if self.published else view.moments.variance
        return varies * weight.square().sum(1) if self.metric == "WIFV" else varies
