"""What a recovery may change of the training loop: its optimiser, each step, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .options import Schedule


class Hooks:
    """The plain loop: AdamW, nothing beside each step, no loss but the objective.

    A step goes: `begin`, forward and backward of the objective and `loss`, clipping, `graded`, the
    optimiser's step, `done`. Steps count from 0. What a hook remembers from step to step must be in
    buffers or parameters of the module, or follow from the step's number: so that a checkpoint
    resumes to the same bits.
    """

    def optimizer(self, parameters: Mapping[str, nn.Parameter],
                  options: Schedule) -> torch.optim.Optimizer:
        """Return the optimiser; of a group that holds `times`, the rate is so many times `lr`."""
        return torch.optim.AdamW(list(parameters.values()), lr=options.lr,
                                 weight_decay=options.decay)

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Do what comes before a step's forward pass."""

    def loss(self) -> torch.Tensor | None:
        """Return what is added to a step's objective, or None."""
        return None

    def graded(self, step: int) -> None:
        """Do what comes once gradients are there, and clipped."""

    def done(self, step: int, rate: float) -> None:
        """Do what comes after the optimiser's step, which had a learning rate of `rate`."""
