"""GRASPrune: one gate a slice under one budget, then one factor a slice that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class GraspGates(Gating):
    """Forward the mask of the likeliest slices that meet the budget, backward sigmoid(g / 1.5).

    GRASPrune (arXiv 2604.19398, ACL 2026): network frozen, own loss, rate 0.01; then factors
    1 + 0.5 tanh(phi) of what stays. Slices are ranked by their gates whatever they cost.
    """

    name: ClassVar[str] = "grasp-gates"
    criterion: str = "taylor"
    relaxation: str = "straight-through(temperature=1.5)"
    budget: str = "projection(trade=False)"
    steps: int = 200
    lr: float = 0.01
    task: float = 1.0
    logits: float = 0.0
    scales: int = 50
