"""DDP: deterministic differentiable pruning, gates alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Ddp(Gating):
    """A deterministic soft L0 of unbounded gates under a Lagrangian, the network frozen.

    Deterministic differentiable pruning (arXiv 2603.08065, by its abstract and a secondary text):
    mu from 0.5 to 0.05, own loss and twice the divergence from the dense network. The budget holds
    from the first step on: gates have no bound, and grow away from it while it comes down.
    """

    name: ClassVar[str] = "ddp"
    criterion: str = "taylor"
    relaxation: str = "soft-l0(start=0.5, end=0.05)"
    budget: str = "lagrangian(lr=1.0, ramp=0.0)"
    steps: int = 200
    lr: float = 0.02
    task: float = 1.0
    logits: float = 2.0
