"""Curvature: a slice matters as much as the loss would grow, to second order, after the refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.evidence.protocol import Context
from spacompiler.evidence.surgeon import Block
from spacompiler.groups.solution import Group
from spacompiler.passes.obs import Obs


@dataclass(frozen=True)
class Curvature(Obs):
    """score_i = growth of tr(G E) as slice i goes, E = E[e e'], e = (W - W') x after the refit.

    G = sum of g g', g the gradient of the loss by what the consumer gives: half of tr(G E) is the
    growth of the loss, with inputs and gradients taken as independent and the mean of g e as zero
    (Kronecker-factored Fisher: OBS of `obs` with outputs weighed as in LLM Surgeon, ICLR 2024).
    Scores of different groups are in one unit, so that a global allocation may compare them.
    With `continued`, G is taken over what a model writes on from the calibration, too, if it does
    (E always is).
    """

    name: ClassVar[str] = "curvature"
    needs: ClassVar[tuple[str, ...]] = ("covariance", "curvature")
    absolute: ClassVar[bool] = True
    rounds: int = 48
    continued: bool = True

    def _blocks(self, group: Group, ctx: Context) -> list[Block]:
        made = super()._blocks(group, ctx)
        metrics = [root(g) for view in ctx.consumers(group)
                   for g in (view.curvature if view.curvature is not None else [])]
        for block, metric in zip(made, metrics, strict=True):
            block.weight = metric @ block.weight
        return made


def root(moment: torch.Tensor) -> torch.Tensor:
    """Return M with M'M = moment, for a symmetric positive semi-definite moment (n, n)."""
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T
