"""Progressive pruning: a little goes, a little is trained, until the target is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Progressive(Gating):
    """Masks under a budget that comes down over two thirds of the steps, while all weights train.

    Interleaved as in Adapt-Pruner (arXiv 2502.03460), by scores that are learned meanwhile; own
    loss and divergence from the dense network together, as SlimQwen (arXiv 2605.08738) found best.
    `beside="adapters(targets='proj')"` trains adapters instead.
    """

    name: ClassVar[str] = "progressive"
    criterion: str = "taylor"
    budget: str = "projection(trade=True, ramp=0.67)"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.05
    every: int = 5
    task: float = 1.0
    logits: float = 1.0
