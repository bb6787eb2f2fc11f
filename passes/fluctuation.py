"""Fluctuation: a slice matters as much as its consumers' inputs vary; a bias repairs their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.errors import SpaError
from spacompiler.evidence.protocol import Context
from spacompiler.evidence.statistics import View
from spacompiler.groups.solution import Group

METRICS = ("IFV", "WIFV", "WIFN")


@dataclass(frozen=True)
class Fluctuation:
    """FLAP (AAAI 2024): sums over the slice's features j and over consumers (input X, weight W).

    IFV_j = Var(X_j); WIFV_j = Var(X_j) ||W_:j||_2^2, the error that is left once a bias has
    repaired the mean, exact for one column; WIFN_j = mean_o |W_oj| ||X_j||_2.

    With `published` these are the numbers of the released code: Var is its running value, which
    sums over positions and weighs examples unevenly (the first one adds nothing, so that there
    must be two), ||X_j||^2 is a mean over examples, and features of `head` groups are squared, as
    it does for attention but not for MLPs. Without, they are the paper's.

    With `standardised` scores are those of its adaptive allocation AL-AM, for `--allocation
    threshold`: z_j = (S_j - mean) / std over all features of a consumer (std of a sample, divisor
    n - 1), and the mean of z over a slice's features.
    """

    name: ClassVar[str] = "fluctuation"
    metric: str = "WIFV"
    published: bool = True
    standardised: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TypeError(f"metric must be one of {', '.join(METRICS)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics that calibration gathers."""
        kinds = {"fluctuation"} if self.published else set()
        return tuple(kinds | ({"moments"} if self.metric == "WIFN" or not kinds else kinds))

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape). Raises SpaError if the code's value is asked of one example."""
        power = 2 if self.published and group.role == "head" else 1
        total = torch.zeros(group.shape, dtype=torch.float64)
        count = torch.zeros(group.shape, dtype=torch.float64)
        for view in ctx.consumers(group):
            values = self._features(view).pow(power)
            if self.standardised:
                spread = values.std() if values.numel() > 1 else values.new_zeros(())
                values = (values - values.mean()) / (spread if spread > 0 else 1.0)
                count += view.onto(torch.ones_like(values))
            total += view.onto(values)
        return total / count.clamp(min=1) if self.standardised else total

    def _features(self, view: View) -> torch.Tensor:
        weight = view.weight.double()
        if self.metric == "WIFN":
            share = view.fluctuation.count if self.published else 1
            return weight.abs().mean(1) * view.moments.norm / share ** 0.5
        varies = self._running(view) if self.published else view.moments.variance
        return varies * weight.square().sum(1) if self.metric == "WIFV" else varies

    @staticmethod
    def _running(view: View) -> torch.Tensor:
        """The released code's value, which is nothing after one example."""
        if view.fluctuation.count < 2:
            raise SpaError("FLAP's running variance needs two examples", where=view.consumer.weight,
                           why="the first one adds nothing to it",
                           fix="give more calibration data, or take the variance over samples: "
                               "fluctuation(published=False)")
        return view.fluctuation.value
