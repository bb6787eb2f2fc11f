"""Compresso: hard-concrete gates learned together with adapters on queries and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Compresso(Gating):
    """L0 gates under a Lagrangian, W + B A on q and v: what both learn is folded at the end.

    Compresso (arXiv 2310.05015): rank 8, alpha 8, the expected cost brought to the target over half
    of the steps, multipliers by gradient ascent. `beside` names the matrices that are adapted.
    """

    name: ClassVar[str] = "compresso"
    criterion: str = "taylor"
    relaxation: str = "hard-concrete"
    budget: str = "lagrangian(lr=0.1, ramp=0.5)"
    beside: str = "adapters(rank=8, alpha=8, targets='q_proj|v_proj')"
    steps: int = 300
    lr: float = 0.1
    beside_lr: float = 5e-5
    task: float = 1.0
    logits: float = 0.0
