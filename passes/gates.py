"""Gates that know of the refit, learned under the budget with the network frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Gates(Gating):
    """Projected straight-through gates whose gradients know that what stays is refit; then factors.

    GRASPrune (arXiv 2604.19398), with OBS in place of first-order gains (see `gates.refits`), from
    scores of `curvature`, and gains set against costs at one price. Meant to be followed by
    `--repair refit`: `scales` are learned on the repaired network.
    """

    name: ClassVar[str] = "gates"
    criterion: str = "curvature"
    budget: str = "projection(trade=True)"
    steps: int = 80
    lr: float = 0.05
    every: int = 4
    average: bool = True
    rows: int = 1
    length: int = 256
    refit: float = 0.1
    scales: int = 40
