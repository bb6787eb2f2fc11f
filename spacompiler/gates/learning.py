"""The loop behind every pass that learns gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ..axes.choices import Choices
from ..errors import SpaError
from ..evidence.calls import Batch
from .beside import Beside
from .budgets import Budget
from .network import Gated, Gates, ones
from .objective import Aim
from .projection import Order, Projection, choices, tables
from .refits import Refitted
from .relaxed import Arrays, Relaxation
from .soft_cost import SoftCost


@dataclass(frozen=True)
class Pace:
    """How long and how fast: `steps`, learning rates of gates and of what trains beside them.

    A mask that the budget projects on is made anew `every` so many steps; with `average`, slices
    are ordered at the end by their mean over the second half of the steps.
    """

    steps: int
    lr: float
    beside_lr: float
    every: int = 1
    clip: float = 1.0
    average: bool = False
    lean: bool = False


@dataclass
class Learner:
    """Learns gates of a network on batches, one a step."""

    gated: Gated
    relaxation: Relaxation
    budget: Budget
    beside: Beside
    aim: Aim
    projection: Projection
    pace: Pace
    refitted: Refitted | None = None
    seed: int = 0
    losses: list[float] = field(default_factory=list)
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _hard: Choices = field(default_factory=dict)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self.projection.problem
        problem.price(problem.full())
        self._cost = SoftCost(problem.cost, self.gated.groups)
        self._share = problem.target / problem.dense
        self._draws = torch.Generator().manual_seed(self.seed)
        own = [{"params": list(self.relaxation.parameters.values()), "lr": self.pace.lr}]
        if self.beside.parameters:
            own.append({"params": list(self.beside.parameters.values()),
                        "lr": self.pace.beside_lr})
        self.optimizer = torch.optim.Adam(own, betas=(0.9, 0.98))

    def run(self, batches: Iterator[Batch], tell: Callable[[str, int, int], None]) -> None:
        """Take all steps. Raises SpaError if the loss is not finite."""
        for step in range(self.pace.steps):
            at = step / max(self.pace.steps - 1, 1)
            if self.budget.projects and step % self.pace.every == 0:
                self._project(at)
            self.step(batches, at)
            if step >= self.pace.steps // 2:
                for name, value in self.relaxation.order().items():
                    self._sums[name] = self._sums.get(name, 0) + value.double()
            tell(f"learning gates, loss {self.losses[-1]:.3f}", step + 1, self.pace.steps)

    def step(self, batches: Iterator[Batch], at: float) -> None:
        """Take one step on one batch, when a share `at` of them is done."""
        total = self.objective(next(batches), at)
        total.backward()
        self._mend()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def objective(self, batch: Batch, at: float) -> torch.Tensor:
        """Return the objective of a batch; `losses` is told of it without the budget's term."""
        given = self.gated.trace.labelled(*batch)
        gates = self.gates(at)
        override = self.refitted.override(self._tensors(gates)) if self.refitted else None
        results = self.gated.call(given, gates, choices=self._hard, weights=self.beside.weight,
                                  override=override, lean=self.pace.lean,
                                  watch=self.aim.watch if self.aim.blocks else None)
        loss = self.aim(results, given)
        self.losses.append(float(loss.detach()))
        if not np.isfinite(self.losses[-1]):
            raise SpaError("learning gates diverged: the loss is not finite",
                           fix="lower the learning rates: lr, beside_lr")
        share = self.share(gates, at)
        beside = self.relaxation.term() + self.beside.term()
        return loss + self.budget.term(share, self._share, at) + beside

    def gates(self, at: float) -> Gates:
        """Return what reads are multiplied by: a mask that meets the budget, or soft gates."""
        if not self.budget.projects:
            return self.relaxation.gate(at, self._draws)
        return {n: self._kept[n].to(p.dtype) + p - p.detach()
                for n, p in self.relaxation.open(at).items()}

    def share(self, gates: Gates, at: float) -> torch.Tensor:
        """Return the share of the dense cost that is open."""
        opened = self._tensors(gates) if self.budget.projects else self.relaxation.open(at)
        return self._cost(opened) / self.projection.problem.dense

    def order(self) -> Order:
        """Return what slices are compared by at the end."""
        found: Mapping[str, torch.Tensor] = self._sums if self.pace.average and self._sums \
            else self.relaxation.order()
        return {n: v.double().numpy() for n, v in found.items()}

    def final(self) -> Arrays:
        """Return the factor of each slice, if it stays: one where it learned under masks."""
        return ones(self.gated.groups) if self.budget.projects else self.relaxation.final()

    @staticmethod
    def _tensors(gates: Gates) -> Arrays:
        return {n: z for n, z in gates.items() if isinstance(z, torch.Tensor)}

    def _project(self, at: float) -> None:
        """Bring the gates as they are to a mask that meets the budget."""
        groups = list(self.gated.groups)
        order = {n: v.double().numpy() for n, v in self.relaxation.order().items()}
        counts = self.projection.by_group(self.projection.counts(
            order, share=self.budget.now(self._share, at)))
        kept = tables(groups, order, counts)
        self._hard = choices(groups, kept)
        self._kept = {n: torch.from_numpy(t) for n, t in kept.items()}
        if self.refitted is not None:
            self.refitted.renew(self._kept)

    def _mend(self) -> None:
        """Trade at one price, and clip what trains beside.

        With g = -p' v (a gate's gradient) and its cost's p' c, gates move along p' (v - l c),
        l = sum p' v / sum p' c: to first order the cost stays what it is.
        """
        own = self.relaxation.parameters
        if self.budget.projects and self.budget.trades:
            opened = {n: self._kept[n].to(p.dtype) + p - p.detach()
                      for n, p in self.relaxation.open(1.0).items()}
            costs = torch.autograd.grad(self._cost(opened), list(own.values()))
            total = sum(float(c.sum()) for c in costs)
            gains = -sum(float(p.grad.sum()) for p in own.values() if p.grad is not None)
            price = gains / total if total else 0.0
            for p, c in zip(own.values(), costs, strict=True):
                p.grad = c * price if p.grad is None else p.grad + price * c
        if self.beside.parameters:
            torch.nn.utils.clip_grad_norm_(list(self.beside.parameters.values()), self.pace.clip)
