"""BiP: pruning as bi-level optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.bilevel import Bilevel
from spacompiler.gates.gating import Gating
from spacompiler.gates.learning import Learner


@dataclass(frozen=True)
class Bip(Gating):
    """Weights answer to the mask on one batch, scores of slices move on another, with the implicit
    gradient of that answer.

    BiP (NeurIPS 2022), of whole slices; masks meet the budget at each step.
    """

    name: ClassVar[str] = "bip"
    learner: ClassVar[type[Learner]] = Bilevel
    criterion: str = "taylor"
    relaxation: str = "straight-through"
    budget: str = "projection(trade=False)"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.05
    task: float = 1.0
    logits: float = 0.0
