"""Training in half precision: what is trained is held in float32 too, and rounded for each step.

A step of a thousandth of a weight is lost in bfloat16, which has eight bits of it: the weight would
not move. So the optimiser works on float32 arrays, and the network on these rounded to its types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

SHORT = frozenset((torch.bfloat16, torch.float16))


@dataclass
class Masters:
    """`held` by name what the optimiser trains: a float32 array where a parameter is shorter."""

    parameters: Mapping[str, nn.Parameter]
    held: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.held = {name: nn.Parameter(p.detach().float()) if p.dtype in SHORT else p
                     for name, p in self.parameters.items()}
        self._pairs = [(p, self.held[name]) for name, p in self.parameters.items()
                       if self.held[name] is not p]

    @property
    def count(self) -> int:
        """How many parameters are held twice."""
        return len(self._pairs)

    def take(self) -> None:
        """Hand gradients on to the arrays that the optimiser trains."""
        for p, master in self._pairs:
            master.grad = None if p.grad is None else p.grad.float()
            p.grad = None

    @torch.no_grad()
    def give(self) -> None:
        """Let the network have what was trained, rounded."""
        for p, master in self._pairs:
            p.copy_(master)
