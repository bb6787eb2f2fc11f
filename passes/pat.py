"""PAT: low-rank operators where slices are written, under one mask that hardens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Pat(Gating):
    """One mask of the hidden axis, v (I + B A) on all that writes there; both are folded exactly.

    Pruning-aware tuning (PAT, AAAI 2025), meant for `--role hidden`: own loss, ten times how far
    the open share is from the target, and the identity loss of A. `--layout uniform` makes a stock
    configuration with a smaller hidden size.
    """

    name: ClassVar[str] = "pat"
    criterion: str = "magnitude"
    relaxation: str = "annealed"
    budget: str = "penalty(strength=10, both=True)"
    beside: str = "operators(rank=32)"
    steps: int = 200
    lr: float = 0.02
    task: float = 1.0
    logits: float = 0.0
