"""Ranks of adapters while they train: each behind a gate, which is folded in at the end.

A layer of an adapter computes B (g * (A x)): `g` has one number a rank. It is a buffer, set from
outside (ranks that grow, a prefix drawn at each step), or a parameter that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

GATE = "rank_gate"


def pairs(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path of the adapted layer, A, B) of every low-rank adapter in a module."""
    for path, part in module.named_modules():
        downs, ups = getattr(part, "lora_A", None), getattr(part, "lora_B", None)
        if isinstance(downs, nn.ModuleDict) and isinstance(ups, nn.ModuleDict):
            for name in downs:
                yield path, downs[name], ups[name]


class Ranks:
    """Gates on all ranks of a module's adapters."""

    def __init__(self, module: nn.Module, *, learned: bool = False) -> None:
        self.pairs = list(pairs(module))
        self._handles = []
        for _, down, _ in self.pairs:
            gate = torch.ones(down.weight.shape[0], device=down.weight.device)
            if learned:
                setattr(down, GATE, nn.Parameter(gate))
            else:
                down.register_buffer(GATE, gate)
            self._handles.append(down.register_forward_hook(_gated))

    def gates(self) -> list[torch.Tensor]:
        """Return the gates, layer by layer: (ranks,)."""
        return [getattr(down, GATE) for _, down, _ in self.pairs]

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply gates into A, and take them away."""
        for (_, down, _), handle in zip(self.pairs, self._handles, strict=True):
            gate = getattr(down, GATE)
            down.weight.mul_(gate.reshape(-1, *[1] * (down.weight.ndim - 1)))
            handle.remove()
            delattr(down, GATE)


def _gated(down: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    """Multiply each rank of A x by its gate; channels of a convolution come second."""
    gate = getattr(down, GATE)
    return out * (gate.reshape(-1, *[1] * (out.ndim - 2)) if isinstance(down, nn.Conv2d) else gate)


CORE = "rank_core"


class Cores:
    """A trained matrix between the two of every adapter: B C A, folded into A at the end.

    `frozen` leaves A and B as they are set.
    """

    def __init__(self, module: nn.Module, *, frozen: bool = True) -> None:
        self.pairs = [(path, down, up) for path, down, up in pairs(module)
                      if isinstance(down, nn.Linear)]
        self._handles = []
        for _, down, up in self.pairs:
            setattr(down, CORE, nn.Parameter(torch.eye(
                down.out_features, device=down.weight.device)))
            self._handles.append(down.register_forward_hook(
                lambda part, args, out: out @ getattr(part, CORE).T))
            for part in (down, up):
                part.weight.requires_grad_(not frozen)

    @torch.no_grad()
    def set(self, i: int, up: torch.Tensor, core: torch.Tensor, down: torch.Tensor) -> None:
        """Give the i-th adapter its B (o, r), C (r, r) and A (r, i)."""
        _, a, b = self.pairs[i]
        a.weight.copy_(down)
        b.weight.copy_(up)
        getattr(a, CORE).copy_(core)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply cores into A, and take them away."""
        for (_, down, _), handle in zip(self.pairs, self._handles, strict=True):
            down.weight.copy_(getattr(down, CORE) @ down.weight)
            handle.remove()
            delattr(down, CORE)
