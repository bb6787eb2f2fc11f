"""One mask that hardens as it learns: a sigmoid that becomes a step."""

from __future__ import annotations

from math import log

import torch

from .network import Gates
from .relaxed import Arrays, Relaxation


class Annealed(Relaxation):
    """m = sigmoid(s u) + b: s = 1 / (1 - ln t / ln T) grows to a step, b falls from 1/2 to 0.

    Pruning-aware tuning (PAT, AAAI 2025). What counts is u >= 0, straight-through; `strength` times
    the mean of (|u| - 1/2)^2 keeps u away from the edge. After a share `frozen` of the steps masks
    learn no more. T is `horizon`, whatever the number of steps.
    """

    def __init__(self, horizon: int = 10000, frozen: float = 0.8, strength: float = 1.0,
                 spread: float = 0.1) -> None:
        super().__init__()
        self.horizon, self.frozen, self.strength = horizon, frozen, strength
        self.spread, self._done = spread, False

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """One half, and a little of the scores."""
        return 0.5 + self.spread * scores.clamp(-3, 3)

    def _now(self, at: float) -> Arrays:
        self._done = at > self.frozen
        return {n: p.detach() if self._done else p for n, p in self.parameters.items()}

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """m."""
        sharp = 1 / (1 - log(max(1.0, at * self.horizon)) / log(self.horizon) + 1e-6)
        return {n: torch.sigmoid(sharp * p) + max(0.5 - at, 0.0)
                for n, p in self._now(at).items()}

    def open(self, at: float) -> Arrays:
        """1 or 0, with the slope of a sigmoid."""
        soft = {n: torch.sigmoid(4 * p) for n, p in self._now(at).items()}
        return {n: (p > 0.5).to(p.dtype) + p - p.detach() for n, p in soft.items()}

    def term(self) -> torch.Tensor:
        """strength times the mean of (|u| - 1/2)^2, while masks learn."""
        if self._done:
            return torch.zeros(())
        every = torch.cat([p.reshape(-1) for p in self.parameters.values()])
        return self.strength * (every.abs() - 0.5).square().mean()
