"""Taylor by elements: what the loss would change, to some order, weight by weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.members import check_reduction, reduced
from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group, Member


@dataclass(frozen=True)
class TaylorElement:
    """score_i = sum over the slice's weights of |w G|, |w^2 F| or |w G - w^2 F / 2| (LLM-Pruner).

    `order` 1, 2 or "mixed" (NeurIPS 2023: `param_first`, `param_second`, `param_mix`); G is the
    gradient of the mean loss, F the mean over examples of squared gradients. With `per="run"` G
    is that of all batches together, held for every weight; with `per="batch"` the scores of
    batches add up, which is the same for one batch. Order 2 is additive: it never holds any.
    """

    name: ClassVar[str] = "taylor-element"
    comparable: ClassVar[bool] = True
    order: int | str = 1
    per: str = "run"
    reduce: str = "sum"

    def __post_init__(self) -> None:
        check_reduction(self.reduce)
        if self.order not in (1, 2, "mixed") or self.per not in ("run", "batch"):
            raise TypeError("order must be 1, 2 or 'mixed'; per must be 'run' or 'batch'")
        if (self.order, self.per) == ("mixed", "batch"):
            raise TypeError("the mixed order needs per='run'")

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that calibration gathers."""
        return {1: ("weight_gradients",) if self.per == "run" else ("elements",),
                2: ("element_squares",),
                "mixed": ("weight_gradients", "weight_squares")}[self.order]

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return reduced([self._member(m, group, ctx) for m in group.members], self.reduce)

    def _member(self, m: Member, group: Group, ctx: Context) -> torch.Tensor:
        if self.order == 2:
            return ctx.sums("element_squares", m, group) / ctx.examples
        if self.order == "mixed":
            w = ctx.stored(m.weight).double()
            first = w * ctx.gradient("weight_gradients", m.weight) / ctx.batches
            second = w.square() * ctx.gradient("weight_squares", m.weight) / ctx.examples
            return ctx.onto((first - second / 2).abs(), m, group)
        if self.per == "batch":
            return ctx.sums("elements", m, group)
        return (ctx.rows(m, group) * ctx.gradient_rows(m, group)).abs().double().sum(-1)
