"""LoRA-GGPO: noise on weights while adapters train, larger where they and their gradients are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from spacompiler.passes.lora import AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.ranks import pairs

HEARD = "row_gradients"


@dataclass(frozen=True)
class Ggpo(Lora):
    """y + x E', E_k normal times (sigma |W'_k| + beta |g_k|^2) / sqrt(inputs), drawn at each step.

    LoRA-GGPO (2025, by a secondary text): W'_k is a row of the adapted weight, g_k the last
    gradient by a row of B. Flat minima are sought where either is large.
    """

    name: ClassVar[str] = "ggpo"
    sigma: float = 0.03
    beta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits:
            raise TypeError("GGPO reads weights at each step, which cannot be held in 8 bits")

    def hooks(self, task: Training) -> AdapterHooks:
        """Noise on the results of adapted linear layers, in train mode."""
        return _Noise(self, task.module)


class _Noise(AdapterHooks):
    """Adds noise to what adapted linear layers give."""

    def __init__(self, row: Ggpo, module: nn.Module) -> None:
        super().__init__(row.plus)
        self._row, self._handles, self._ups = row, [], []
        for path, _, up in pairs(module):
            part = module.get_submodule(path)
            if isinstance(up, nn.Linear):
                up.register_buffer(HEARD, up.weight.new_zeros(up.out_features))
                self._ups.append(up)
                self._handles.append(part.register_forward_hook(self._noisy))

    def _noisy(self, part: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if not part.training:
            return out
        with torch.no_grad():
            (name,) = part.lora_A
            up, down = part.lora_B[name], part.lora_A[name]
            base = part.get_base_layer().weight
            turned = part.fan_in_fan_out
            rows = (base.T if turned else base) + part.scaling[name] * (up.weight @ down.weight)
            size = self._row.sigma * rows.norm(dim=1) + self._row.beta * getattr(up, HEARD).square()
            noise = torch.randn_like(rows) * (size / rows.shape[1] ** 0.5).unsqueeze(1)
        return out + functional.linear(args[0], noise)

    @torch.no_grad()
    def graded(self, step: int) -> None:
        """Remember the norms of the gradients by rows of B."""
        for up in self._ups:
            if up.weight.grad is not None:
                getattr(up, HEARD).copy_(up.weight.grad.norm(dim=1))

    def finish(self) -> dict[str, Any]:
        """Take the noise off."""
        for handle in self._handles:
            handle.remove()
        for up in self._ups:
            delattr(up, HEARD)
        return {}
