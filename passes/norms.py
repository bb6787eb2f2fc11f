"""Norms-and-biases recovery: the cheapest, a few parameters in ten thousand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spacompiler.train.loop import Training, train, vectors
from spacompiler.train.options import Schedule


@dataclass(frozen=True)
class Norms(Schedule):
    """Train gains of norms and biases only (PERP, Zimmer et al. 2023)."""

    name: ClassVar[str] = "norms"
    shares: ClassVar[bool] = True

    def run(self, task: Training) -> dict[str, Any]:
        """Train in place; raises SpaError if the network has neither norms nor biases."""
        return train(task, self, dict(vectors(task.module)))
