"""Taylor: a slice matters as much as the loss would change, to first order, without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.groups import Group
from spacompiler.protocols import Context


@dataclass(frozen=True)
class Taylor:
    """First order in a gate m_i = 1 on what consumers read of slice i, without weight gradients.

    dL/dm_i = sum_t x_{t,i} dL/dx_{t,i}. With `per="token"` (the default) the score is the sum of
    |x_{t,i} dL/dx_{t,i}| over examples and positions t, so that what helps here and hurts there
    does not cancel; with `per="batch"` it is |dL/dm_i|, which for bias-free linear layers equals
    the sum of w * dL/dw over the slice's producer row (LLM-Pruner's vector score, NeurIPS 2023).
    """

    name: ClassVar[str] = "taylor"
    per: str = "token"

    def __post_init__(self) -> None:
        if self.per not in ("token", "batch"):
            raise TypeError("per must be 'token' or 'batch'")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic that calibration gathers."""
        return ("token_gates",) if self.per == "token" else ("gates",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return ctx.token_gates(group) if self.per == "token" else ctx.gates(group).abs()


@dataclass(frozen=True)
class TaylorElement:
    """score_i = sum over the slice's weights of |w * dL/dw| (LLM-Pruner, `param_first`)."""

    name: ClassVar[str] = "taylor-element"
    needs: ClassVar[tuple[str, ...]] = ("weight_gradients",)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        for member in group.members:
            product = ctx.rows(member, group) * ctx.gradient_rows(member, group)
            total += product.abs().sum(-1, dtype=torch.float64)
        return total
