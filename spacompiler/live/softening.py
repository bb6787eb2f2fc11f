"""Soft shrinking: slices that are next to go become smaller, and may still come back."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.axes.choices import Choices, keep_mask
from spacompiler.axes.expressions import atoms
from spacompiler.groups.solution import Solution


@torch.no_grad()
def soften(model: nn.Module, solution: Solution, choices: Choices, by: float) -> None:
    """Multiply the parameters of all slices that choices take away, in place, tied ones once.

    Soft shrinkage as in ISS-P (2023), of whole slices.
    """
    learned = dict(model.named_parameters())
    for name, dims in solution.weights().items():
        p = learned.get(name)
        if p is not None and any(a in choices for e in dims for a in atoms(e)):
            kept = torch.from_numpy(keep_mask(dims, choices)).to(p.device)
            p.mul_(torch.where(kept, 1.0, by).to(p.dtype))
