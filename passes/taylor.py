"""Taylor: a slice matters as much as the loss would change, to some order, without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Taylor:
    """First order in a gate m_i = 1 on what consumers read of slice i, without weight gradients.

    dL/dm_i = sum_t x_{t,i} dL/dx_{t,i}. With `per="token"` (the default) the score is the sum of
    |x_{t,i} dL/dx_{t,i}| over examples and positions t, so that what helps here and hurts there
    does not cancel; with `per="batch"` it is |dL/dm_i|; with `per="example"` the gate's diagonal
    Fisher information, the sum over examples n of (dL_n/dm_i)^2.
    """

    name: ClassVar[str] = "taylor"
    comparable: ClassVar[bool] = True
    per: str = "token"

    _NEEDS: ClassVar[dict[str, str]] = {
        "token": "token_gates", "batch": "gates", "example": "fisher"}

    def __post_init__(self) -> None:
        if self.per not in self._NEEDS:
            raise TypeError(f"per must be one of {', '.join(self._NEEDS)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that calibration gathers."""
        return (self._NEEDS[self.per],)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return {"token": ctx.token_gates, "batch": lambda g: ctx.gates(g).abs(),
                "example": lambda g: ctx.gate("fisher", g)}[self.per](group)

