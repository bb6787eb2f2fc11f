"""Taylor by channels: what one gate on each channel of each member would change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.members import check_reduction, reduced
from spacompiler.evidence.protocol import Context
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class TaylorVector:
    """score_i = sum over members of |sum over the channel's weights of w dL/dw| (LLM-Pruner).

    The channels of a head add up after the absolute value is taken, as in the released code
    (NeurIPS 2023, `vectorize`). Gradients are those of a batch, and scores of batches add up:
    with all samples in one batch it is the published formula. No gradient is held.
    """

    name: ClassVar[str] = "taylor-vector"
    comparable: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("vectors",)
    reduce: str = "sum"

    def __post_init__(self) -> None:
        check_reduction(self.reduce)

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        return reduced([ctx.sums("vectors", m, group) for m in group.members], self.reduce)
