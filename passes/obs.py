"""OBS: a slice matters as much as its consumers' outputs change, once what stays is refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.evidence.surgeon import DAMPING, Block, blocks, removals
from spacompiler.groups.solution import Group


@dataclass(frozen=True)
class Obs:
    """score_i = growth of E||(W - W') x||^2 as slice i goes, W' refit by least squares each time.

    Slices (heads as blocks) go in `rounds`, lowest first, errors measured anew after each; the
    scores of those removed so far add up to the exact error of the layer, wherever one stops at
    the end of a round. With `bias`, a bias is taken to repair the mean. H is damped by `damping`
    of its mean diagonal. ZipLM (NeurIPS 2023), OSSCAR (ICML 2024); see `spacompiler.surgeon`.
    """

    name: ClassVar[str] = "obs"
    needs: ClassVar[tuple[str, ...]] = ("covariance",)
    rounds: int = 16
    bias: bool = True
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.damping <= 0:
            raise TypeError("rounds must be at least 1 and damping positive")

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return (*group.shape)."""
        score = torch.zeros(group.shape, dtype=torch.float64)
        parts = self._blocks(group, ctx)
        highest = torch.zeros(())
        for gone, errors, cost in removals(parts, group.shape, self.rounds):
            alone = errors[gone].clamp(min=0)
            share = alone * (cost / alone.sum().clamp(min=1e-300))
            score[gone] = torch.maximum(share, highest + 1e-6 * share)  # later is never lower
            highest = score[gone].max()
        return score

    def _blocks(self, group: Group, ctx: Context) -> list[Block]:
        return blocks(ctx.consumers(group), centred=self.bias, damping=self.damping)
