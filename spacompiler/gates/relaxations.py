"""Relaxations: how a choice of slices is made differentiable. One row of a table each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, prod
from typing import Any, ClassVar

import torch

from ..groups.solution import Group
from ..plan.problem import Problem
from ..request.registry import row
from .annealed import Annealed
from .network import Gates, Values
from .relaxed import Arrays, Relaxation

DROPPED = 0.01
"""The chance at which hard-concrete gates start closed."""


class StraightThrough(Relaxation):
    """Forward a mask that meets the budget, backward p = sigmoid(theta / temperature).

    Projected straight-through (GRASPrune, arXiv 2604.19398).
    """

    projected: ClassVar[bool] = True

    def __init__(self, temperature: float = 1.0, spread: float = 1.0) -> None:
        super().__init__()
        self.temperature, self.spread = temperature, spread

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """`spread` times the scores."""
        return self.spread * scores

    def open(self, at: float) -> Arrays:
        """p."""
        return {n: torch.sigmoid(p / self.temperature) for n, p in self.parameters.items()}


class SoftL0(Relaxation):
    """Gates z >= 0, not bounded above; s = clamp(1.2 sigmoid((z - mu) 2.4 / mu) - 0.1, 0, 1) is
    what counts.

    mu goes from `start` to `end`, so that what counts becomes what is above zero: deterministic
    differentiable pruning (arXiv 2603.08065). Gates of what stays are folded as they are.
    """

    def __init__(self, start: float = 0.5, end: float = 0.05, spread: float = 0.1) -> None:
        super().__init__()
        self.start_at, self.end_at, self.spread = start, end, spread

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """One, and a little of the scores."""
        return 1 + self.spread * scores.clamp(-3, 3)

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """z."""
        return {n: p.clamp(min=0) for n, p in self.parameters.items()}

    def open(self, at: float) -> Arrays:
        """s."""
        mu = self.start_at * (self.end_at / self.start_at) ** at
        return {n: (1.2 * torch.sigmoid((p - mu) * 2.4 / mu) - 0.1).clamp(0, 1)
                for n, p in self.parameters.items()}

    def final(self) -> Arrays:
        """z."""
        return {n: p.detach().clamp(min=0) for n, p in self.parameters.items()}


class HardConcrete(Relaxation):
    """z = clamp(sigmoid((log u - log(1 - u) + log alpha) / beta) 1.2 - 0.1, 0, 1), u uniform.

    L0 regularisation (Louizos et al., ICLR 2018), as Compresso (arXiv 2310.05015) has it: the
    chance of z > 0 counts; of what stays sigmoid(0.8 log alpha / beta) is folded.
    """

    def __init__(self, beta: float = 2 / 3, dropped: float = DROPPED, spread: float = 0.0) -> None:
        super().__init__()
        self.beta, self.dropped, self.spread = beta, dropped, spread

    def first(self, scores: torch.Tensor) -> torch.Tensor:
        """log alpha of a drop rate, and `spread` times the scores."""
        return log((1 - self.dropped) / self.dropped) + self.spread * scores

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """z, drawn anew."""
        made = {}
        for name, p in self.parameters.items():
            u = torch.rand(p.shape, generator=draws).clamp(1e-6, 1 - 1e-6)
            made[name] = (1.2 * torch.sigmoid((u.log() - (1 - u).log() + p) / self.beta)
                          - 0.1).clamp(0, 1)
        return made

    def open(self, at: float) -> Arrays:
        """P(z > 0) = sigmoid(log alpha - beta log(0.1 / 1.1))."""
        return {n: torch.sigmoid(p - self.beta * log(0.1 / 1.1))
                for n, p in self.parameters.items()}

    def final(self) -> Arrays:
        """sigmoid(0.8 log alpha / beta)."""
        return {n: torch.sigmoid(0.8 * p.detach() / self.beta)
                for n, p in self.parameters.items()}


class Threshold(Relaxation):
    """m = 1[s > theta], theta one learned threshold a group; backward sigmoid of their difference.

    It is `sharpness` (s - theta). Scores s stay as they were measured. Learned thresholds as in
    LAPP (2023).
    """

    def __init__(self, sharpness: float = 4.0, start: float = -3.0) -> None:
        super().__init__()
        self.sharpness, self.start_at = sharpness, start
        self.scores: Mapping[str, torch.Tensor] = {}

    def start(self, groups: Sequence[Group], scores: Values, problem: Problem) -> None:
        """Thresholds start below all but the lowest scores of each group."""
        self.groups = groups
        self.scores = {n: _standard(s).float() for n, s in scores.items()}
        self.parameters = {g.name: torch.full((), self.start_at, requires_grad=True)
                           for g in groups}

    def open(self, at: float) -> Arrays:
        """m."""
        found = {}
        for name, theta in self.parameters.items():
            p = torch.sigmoid(self.sharpness * (self.scores[name] - theta))
            found[name] = (p > 0.5).to(p.dtype) + p - p.detach()
        return found

    def order(self) -> Arrays:
        """s - theta."""
        return {n: self.scores[n] - theta.detach() for n, theta in self.parameters.items()}


class Widths(Relaxation):
    """A softmax over the legal counts of each unit: z_u = sum of the shares of counts above rank u.

    Two counts are drawn at each step by Gumbel noise, as in transformable architecture search
    (Dong and Yang, NeurIPS 2019); slices are ranked by their scores, so that what is tried is what
    would stay. `heat` goes from the first to a tenth of it.
    """

    def __init__(self, heat: float = 5.0) -> None:
        super().__init__()
        self.heat = heat
        self.legal: dict[str, tuple[torch.Tensor, tuple[Group, ...]]] = {}
        self.rank: Arrays = {}

    def start(self, groups: Sequence[Group], scores: Values, problem: Problem) -> None:
        """All counts are equally likely at first."""
        self.groups = groups
        own = {g.name for g in groups}
        self.legal = {u.name: (torch.tensor(u.legal), tuple(g for g in u.groups if g.name in own))
                      for u in problem.units}
        self.parameters = {name: torch.zeros(len(counts), requires_grad=True)
                           for name, (counts, _) in self.legal.items()}
        self.rank = {n: torch.argsort(-s, dim=-1, stable=True).argsort(-1)
                     for n, s in scores.items()}

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """Shares of two counts that are drawn."""
        heat = self.heat * 0.1 ** at
        shares = {}
        for name, p in self.parameters.items():
            noise = -(-torch.rand(p.shape, generator=draws).clamp(1e-9, 1 - 1e-9).log()).log()
            logits = (p.log_softmax(0) + noise) / heat
            two = logits.topk(min(2, len(logits))).indices
            shares[name] = torch.zeros_like(p).scatter(0, two, logits[two].softmax(0))
        return self._spread(shares)

    def open(self, at: float) -> Arrays:
        """The chance that a count above a slice's rank is taken."""
        return self._spread({n: p.softmax(0) for n, p in self.parameters.items()})

    def order(self) -> Arrays:
        """The same: the median count of each unit lies where it is one half."""
        return {n: z.detach() - 1e-6 * self.rank[n] for n, z in self.open(1.0).items()}

    def _spread(self, shares: Values) -> Arrays:
        found = {}
        for name, (counts, groups) in self.legal.items():
            above = shares[name].flip(0).cumsum(0).flip(0)  # share of this count and all larger
            for group in groups:
                index = torch.searchsorted(counts, self.rank[group.name] + 1)
                found[group.name] = above[index]
        return found


class Inputs(Relaxation):
    """g(x) in {0, 1} from a small net on what is read, straight-through, pushed to be the same for
    all x: the mean gate counts, and `strength` times mean g (1 - g) of it is added to the loss
    (consensus sub-network, 2023).
    """

    by_input: ClassVar[bool] = True

    def __init__(self, hidden: int = 8, momentum: float = 0.9, strength: float = 1.0) -> None:
        super().__init__()
        self.hidden, self.momentum, self.strength = hidden, momentum, strength
        self.seen: Arrays = {}
        self.mean: Arrays = {}
        self.spread: dict[str, float] = {}

    def start(self, groups: Sequence[Group], scores: Values, problem: Problem) -> None:
        """Nets that open nearly all gates, more those of higher scores."""
        self.groups = groups
        draws = torch.Generator().manual_seed(0)
        for g in groups:
            n = prod(g.shape)
            self.parameters |= {
                f"{g.name} in": (torch.randn(n, self.hidden, generator=draws) / n**0.5
                                 ).requires_grad_(),
                f"{g.name} out": (0.1 * torch.randn(self.hidden, n, generator=draws)
                                  ).requires_grad_(),
                f"{g.name} bias": (1 + 0.5 * scores[g.name].reshape(-1)).float().requires_grad_()}
        self.mean = {g.name: torch.sigmoid(self.parameters[f"{g.name} bias"]).detach()
                     for g in groups}

    def gate(self, at: float, draws: torch.Generator) -> Gates:
        """Functions of what is read."""
        return {g.name: self._net(g.name) for g in self.groups}

    def _net(self, name: str) -> Any:
        def gate(pooled: torch.Tensor) -> torch.Tensor:
            pooled = pooled.float()
            x = pooled / pooled.mean(1, keepdim=True).clamp(min=1e-9)
            hidden = torch.tanh(x @ self.parameters[f"{name} in"])
            p = torch.sigmoid(hidden @ self.parameters[f"{name} out"]
                              + self.parameters[f"{name} bias"])
            hard = (p > 0.5).to(p.dtype)
            made = hard + p - p.detach()
            self.seen[name] = made.mean(0)
            self.spread[name] = float(hard.var(0, unbiased=False).mean().detach())
            self.mean[name] = self.momentum * self.mean[name] + \
                (1 - self.momentum) * (hard + p).detach().mean(0) / 2
            return made

        return gate

    def open(self, at: float) -> Arrays:
        """The mean gate over the batch that was run last."""
        return {g.name: self.seen.get(g.name, self.mean[g.name]).reshape(g.shape)
                for g in self.groups}

    def term(self) -> torch.Tensor:
        """Mean of g (1 - g), g the mean gate of each slice over the batch."""
        every = torch.cat([z.reshape(-1) for z in self.open(1.0).values()])
        return self.strength * (every * (1 - every)).mean()

    def order(self) -> Arrays:
        """Moving averages of the mean gates."""
        return {g.name: self.mean[g.name].reshape(g.shape) for g in self.groups}


RELAXATIONS: Mapping[str, type[Relaxation]] = {
    "straight-through": StraightThrough, "soft-l0": SoftL0, "hard-concrete": HardConcrete,
    "threshold": Threshold, "widths": Widths, "inputs": Inputs,
    "annealed": Annealed,
}


def relaxation(text: str) -> Relaxation:
    """Return a new relaxation for `name(option=value)`. Raises UsageError for an unknown one."""
    return row(RELAXATIONS, text, "relaxation")


def _standard(scores: torch.Tensor) -> torch.Tensor:
    """Scores less their mean, by their deviation."""
    return (scores - scores.mean()) / scores.std(unbiased=False).clamp(min=1e-12)


def standardised(scores: Values, prices: Mapping[str, float] | None = None) -> Arrays:
    """Return log(score / price) of all slices of all groups, less the mean, by the deviation.

    Scores at or below zero are raised to the least that is above.
    """
    every = torch.cat([s.double().reshape(-1) for s in scores.values()])
    least = float(every[every > 0].min()) if bool((every > 0).any()) else 1.0
    logs = {n: s.double().clamp(min=least).log() - log((prices or {}).get(n, 1.0))
            for n, s in scores.items()}
    flat = torch.cat([s.reshape(-1) for s in logs.values()])
    mean, deviation = flat.mean(), flat.std(unbiased=False).clamp(min=1e-9)
    return {n: (s - mean) / deviation for n, s in logs.items()}
