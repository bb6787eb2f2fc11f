"""ALLoRA: adapters whose rows learn the faster the less they have moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spacompiler.passes.lora import AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.ranks import pairs


@dataclass(frozen=True)
class Allora(Lora):
    """The gradient by row k of B A is multiplied by 1 / sqrt(|(B A)_k| + 1 / eta^2).

    ALLoRA (2024, by a secondary text): no dropout, no alpha; B leaves zero at `eta` times the rate
    and slows down as its rows grow.
    """

    name: ClassVar[str] = "allora"
    alpha: int = 8
    eta: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout or self.dora or self.eta <= 0 or self.alpha != self.rank:
            raise TypeError("ALLoRA has no dropout, no dora, alpha = rank, and eta above 0")

    def hooks(self, task: Training) -> AdapterHooks:
        """Gradients of adapters scaled by rows."""
        return _Rows(self.plus, task.module, self.eta)


class _Rows(AdapterHooks):
    """Scales what reaches each output of an adapter, backward only."""

    def __init__(self, plus: float, module: nn.Module, eta: float) -> None:
        super().__init__(plus)
        self._handles = []
        for _, down, up in pairs(module):
            self._handles.append(up.register_forward_hook(
                lambda part, args, out, down=down: _scaled(out, factors(down, part, eta))))

    def finish(self) -> dict[str, Any]:
        for handle in self._handles:
            handle.remove()
        return {}


@torch.no_grad()
def factors(down: nn.Module, up: nn.Module, eta: float) -> torch.Tensor:
    """Return 1 / sqrt(|(B A)_k| + 1 / eta^2) of each row k of B A: (outputs,)."""
    a, b = (part.get_parameter("weight").flatten(1) for part in (down, up))
    return (torch.linalg.vector_norm(b @ a, dim=1) + eta ** -2).rsqrt()


def _scaled(out: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """The same values; their gradient is multiplied by `by`, along the outputs."""
    rows = by.reshape(-1, *[1] * (out.ndim - 2)) if out.ndim == 4 else by
    return out * rows + (out * (1 - rows)).detach()
