"""TAS: a softmax over the widths of each unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Tas(Gating):
    """Widths are drawn two at a step by Gumbel noise, and their shares learned; weights train too.

    Transformable architecture search (Dong and Yang, NeurIPS 2019); slices are ranked by
    `criterion` in place of an interpolation over channels. Distil afterwards:
    `--recover "full(task=1, logits=1, temperature=4)"`.
    """

    name: ClassVar[str] = "tas"
    criterion: str = "taylor"
    relaxation: str = "widths(heat=5.0)"
    budget: str = "penalty(strength=2.0, both=True)"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.1
    task: float = 1.0
    logits: float = 0.0
