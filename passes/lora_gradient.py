"""LoRA-gradient: what a slice matters, judged by the gradients of adapters alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class LoraGradient:
    """|step * W'| summed over a slice, step = [W'(theta) - W'(theta - eta * gradient)] / eta.

    W' is the merged weight, theta the adapter's parameters (LoRAPrune, arXiv 2305.18403). Each
    array's vector of scores is divided by its L2 norm, then the arrays of the group are added.
    The defaults are those of the released code: absolute values, LoRA's factor s in W' only. The
    paper's form is `power=2, normalise=False`, with s and eta as the user sets them.
    """

    name: ClassVar[str] = "lora-gradient"
    needs: ClassVar[tuple[str, ...]] = ("adapter_steps",)
    power: int = 1
    eta: float = 1.0
    scaled: bool = False
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise TypeError("power must be 1 (released code) or 2 (paper)")
        if not self.eta > 0:
            raise TypeError("eta must be positive")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        for member in group.members:
            found = ctx.adapted(member, group, eta=self.eta, scaled=self.scaled)
            if found is None:
                continue
            each = (found.step * found.weight).abs().pow(self.power).sum(-1, dtype=torch.float64)
            total += each / (each.norm() + 1e-8) if self.normalise else each
        return total
