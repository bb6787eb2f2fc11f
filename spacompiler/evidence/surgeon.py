"""The optimal brain surgeon on slices: exact errors of a consumer after its kept columns are refit.

Removing the features S of a consumer W with second moment H of its inputs, and refitting the
rest, costs E|| (W - W') x ||^2 = tr(W_S ([H^-1]_SS)^-1 W_S'), and W' = W - W_S ([H^-1]_SS)^-1
[H^-1]_S: (Hassibi and Stork, 1993; by blocks in ZipLM, NeurIPS 2023, and OSSCAR, ICML 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..errors import SpaError
from .statistics import Covariance, View

DAMPING = 0.01


@dataclass
class Block:
    """One shared index of a consumer: H^-1 (f, f), W (outputs, f), the slice of each feature."""

    inverse: torch.Tensor
    weight: torch.Tensor
    slot: torch.Tensor

    def errors(self, slices: int) -> torch.Tensor:
        """Return the error of removing each slice by itself, 0 without features: (slices,)."""
        found = torch.zeros(slices, dtype=torch.float64)
        features = torch.argsort(self.slot, stable=True)[int((self.slot < 0).sum()):]
        counts = torch.bincount(self.slot[features], minlength=slices)
        starts = counts.cumsum(0) - counts
        for count in counts.unique().tolist():
            if count:
                which = torch.nonzero(counts == count).squeeze(1)
                index = features[starts[which].unsqueeze(1) + torch.arange(count)]
                found[which] = self._errors(index)
        return found

    def _errors(self, index: torch.Tensor) -> torch.Tensor:
        """Errors of sets of features, index (sets, features)."""
        inverse = self.inverse[index.unsqueeze(2), index.unsqueeze(1)]
        columns = self.weight.T[index]
        return (columns * torch.linalg.solve(inverse, columns)).sum((1, 2))

    def remove(self, gone: torch.Tensor) -> float:
        """Remove the slices marked in `gone` (slices,), refit the rest, return what it costs."""
        inside = (self.slot >= 0) & gone[self.slot.clamp(min=0)]
        out, kept = torch.nonzero(inside).squeeze(1), torch.nonzero(~inside).squeeze(1)
        if not len(out):
            return 0.0
        columns, rows = self.weight[:, out], self.inverse[out]
        solved = torch.linalg.solve(rows[:, out], torch.cat([columns.T, rows[:, kept]], dim=1))
        cost = (columns.T * solved[:, : len(columns)]).sum()
        change = solved[:, len(columns):]
        self.weight = self.weight[:, kept].addmm_(columns, change, alpha=-1)
        self.inverse = self.inverse[kept.unsqueeze(1), kept].addmm_(
            rows[:, kept].T, change, alpha=-1)
        self.slot = self.slot[kept]
        return float(cost)


def blocks(views: Sequence[View], *, centred: bool, damping: float = DAMPING) -> list[Block]:
    """Return the blocks of a group's consumers, damped by a share of H's mean diagonal.

    With `centred` a bias is taken to repair the mean, so that only the covariance counts.
    """
    return [Block(_inverse(view.covariance, i, centred, damping), weight.double(), slot)
            for view in views
            for i, (weight, slot) in enumerate(zip(view.weight, view.slot, strict=True))]


def _inverse(seen: Covariance, index: int, centred: bool, damping: float) -> torch.Tensor:
    """The inverse of one damped moment, (f, f); no more than two of that size are held beside.

    Raises SpaError where there is none.
    """
    h = seen.moment(index, centred=centred)
    h.diagonal().add_(damping * h.diagonal().mean().clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(h)
    if failed or not factor.diagonal().isfinite().all():
        finite = bool(h.diagonal().isfinite().all())
        raise SpaError("the moments of what a layer reads cannot be inverted",
                       why="its samples are all alike" if finite else
                       "calibration leads to NaN or infinity there",
                       fix="give other calibration data, more of it, or a larger damping")
    return torch.cholesky_inverse(factor, out=h)


def removals(parts: Sequence[Block], shape: tuple[int, ...],
             rounds: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Remove everything in rounds, lowest error first, the same number under each outer slice.

    Yields (mask of what goes, error of each slice by itself, what the round costs together), the
    errors measured anew after each round. Shapes: `shape`.
    """
    slices, size = prod(shape), shape[-1]
    live = torch.ones(slices, dtype=torch.bool)
    step = -(-size // min(rounds, size))
    for _ in range(0, size, step):
        errors = sum((part.errors(slices) for part in parts), torch.zeros(slices).double())
        rank = torch.where(live, errors, torch.inf).reshape(-1, size)
        lowest = rank.argsort(dim=1, stable=True)[:, :step]
        gone = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, lowest, True)
        gone = gone.reshape(-1) & live
        live &= ~gone
        cost = sum(part.remove(gone) for part in parts)
        yield gone.reshape(shape), errors.reshape(shape), cost
