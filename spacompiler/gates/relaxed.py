"""What relaxations have in common: how a choice of slices is made differentiable.

All speak of the same things by group: `gate` is what reads are multiplied by, `open` how much of
a slice counts as there (what a budget adds up), `order` what a threshold is put on at the end, and
`final` the factor that is folded into the weights of what stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..groups.solution import Group
from ..plan.problem import Problem
from .network import Gates, Values

Arrays = dict[str, torch.Tensor]


class Relaxation:
    """What all have in common: one learned number a slice, and gates that end at one or zero."""

    projected: ClassVar[bool] = False
    by_input: ClassVar[bool] = False

    def __init__(self) -> None:
        self.parameters: Arrays = {}
        self.groups: Sequence[Group] = ()

    def start(self, groups: Sequence[Group], scores: Values, problem: Problem) -> None:
        """Make parameters; `scores` are standardised over all slices of all groups."""
        self.groups = groups
        self.parameters = {g.name: self.first(scores[g.name]).detach().float().requires_grad_()
                           for g in groups}

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """Return where the parameters of a group start."""
        return scores.clone()

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """Return what reads are multiplied by, when a share `at` of the steps is done."""
        return self.open(at)

    def open(self, at: float) -> Arrays:
        """Return how much of each slice counts, differentiably."""
        raise NotImplementedError

    def term(self) -> torch.Tensor:
        """Return what the relaxation itself adds to the loss of the batch that was run last."""
        return torch.zeros(())

    def order(self) -> Arrays:
        """Return numbers that slices of all groups are compared by: more stays longer."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def final(self) -> Arrays:
        """Return the factor of each slice, if it stays."""
        return {g.name: torch.ones(g.shape) for g in self.groups}
