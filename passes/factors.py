"""Factors of what stays, learned after the repair: nothing is said of what goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating
from spacompiler.stages.records import Scheduling, Scored


@dataclass(frozen=True)
class Factors(Gating):
    """The second half of `gates` by itself: what goes is chosen by `criterion` and the allocation
    that is asked for, then the repair fits what stays, then factors are learned and folded.

    A factor each slice that stays and each row that writes into the hidden dimension, Adam on the
    divergence from the dense network, no weight trained otherwise (GRASPrune's second stage,
    arXiv 2604.19398).
    """

    name: ClassVar[str] = "factors"
    allocates: ClassVar[bool] = True
    criterion: str = "curvature"
    rows: int = 1
    length: int = 256
    scales: int = 40
    streams: bool = True

    def run(self, task: Scheduling) -> Scored:
        """Return scores alone: the allocation finds counts."""
        gated = self._gated(task)
        importance, context, scores = self._scored(task, gated)
        return Scored(importance, tuple(gated.groups),
                      {n: s.double().numpy() for n, s in scores.items()}, context=context)
