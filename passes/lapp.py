"""LAPP: one learned threshold a group, while all weights train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Lapp(Gating):
    """Slices with scores below a learned threshold are masked; cost above the target is fined.

    LAPP (2023, by its abstract): layers find their own shares under one budget. Scores are those of
    `criterion` (of scales of batch norms, or of norms of filters), measured once.
    """

    name: ClassVar[str] = "lapp"
    criterion: str = "magnitude"
    relaxation: str = "threshold(sharpness=4.0)"
    budget: str = "penalty(strength=2.0)"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.05
    task: float = 1.0
    logits: float = 0.0
