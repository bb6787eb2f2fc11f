"""GS-LoRA: a group lasso on adapters, so that whole ones vanish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spacompiler.passes.lora import AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.ranks import pairs


@dataclass(frozen=True)
class GsLora(Lora):
    """Loss + lasso · sum over adapters of sqrt(|A|^2 + |B|^2), by a proximal step after Adam's.

    The regulariser of GS-LoRA (2024, Practical Continual Forgetting): adapters that help too little
    become exactly zero, and their layers stay as they were.
    """

    name: ClassVar[str] = "gs-lora"
    lasso: float = 1.0

    def hooks(self, task: Training) -> AdapterHooks:
        """Shrink every adapter after each step."""
        return _Lasso(self.plus, task.module, self.lasso)


class _Lasso(AdapterHooks):
    """x <- x max(0, 1 - rate · lasso / |x|) for the two matrices of each adapter together."""

    def __init__(self, plus: float, module: nn.Module, lasso: float) -> None:
        super().__init__(plus)
        self._pairs, self._lasso = [(down, up) for _, down, up in pairs(module)], lasso

    @torch.no_grad()
    def done(self, step: int, rate: float) -> None:
        """Take the proximal step."""
        for down, up in self._pairs:
            norm = (down.weight.square().sum() + up.weight.square().sum()).sqrt()
            left = (1 - rate * self._lasso / norm.clamp(min=1e-12)).clamp(min=0)
            down.weight.mul_(left)
            up.weight.mul_(left)

    def finish(self) -> dict[str, Any]:
        """Say how many adapters are left."""
        return {"adapters": len(self._pairs), "adapters left": sum(
            bool(up.weight.any()) and bool(down.weight.any()) for down, up in self._pairs)}
