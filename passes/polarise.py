"""Polarised gates: nets that see the input, pushed to one answer for all inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spacompiler.gates.gating import Gating


@dataclass(frozen=True)
class Polarise(Gating):
    """Gates of each input, by a small net on what is read, polarised to one consensus sub-network.

    Consensus sub-network (2023, by its abstract): the mean gate of each slice is driven to 0 or 1,
    so that dropping the nets at the end leaves one static network.
    """

    name: ClassVar[str] = "polarise"
    criterion: str = "magnitude"
    relaxation: str = "inputs(strength=1.0)"
    budget: str = "penalty(strength=4.0, both=True)"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.02
    task: float = 1.0
    logits: float = 0.0
