"""Full recovery: train every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from spacompiler.train.loop import Training, train
from spacompiler.train.options import Schedule


@dataclass(frozen=True)
class Full(Schedule):
    """Train all floating-point parameters; Adam then holds two more arrays a weight."""

    name: ClassVar[str] = "full"
    shares: ClassVar[bool] = True
    lr: float = 1e-4

    def run(self, task: Training) -> dict[str, Any]:
        """Train in place."""
        return train(task, self, {n: p for n, p in task.module.named_parameters()
                                  if p.is_floating_point()})
