"""Measurements that allocation passes may ask for, made only when they are asked for.

Error curves say what a group costs by itself; these say what whole blocks do to the hidden state,
and what moving one group's count does once all of them are pruned and repaired together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..axes.choices import Choices
from ..errors import SpaError
from ..evidence.calls import Batch
from ..evidence.labels import inputs_only
from ..evidence.losses import distance, first_floating
from ..evidence.scores import Scores
from ..evidence.watching import watched
from ..groups.repeats import block
from ..groups.solution import Solution
from ..plan.problem import Problem
from ..repair.evidence import Compensation
from ..repair.repairer import draft
from ..repair.sites import sites
from ..torch_backend.run.masks import masks
from ..torch_backend.run.runner import Runner
from ..torch_backend.trace import Trace
from ..torch_backend.untouched import untouched
from .sensitivity import Change, Sensitivity


@dataclass
class Measure:
    """What is measured on a torch module; `plan(kept)` turns counts into choices."""

    module: nn.Module
    trace: Trace
    solution: Solution
    batches: Sequence[Batch]
    loss: Callable[..., torch.Tensor]
    context: Scores
    compensation: Compensation | None
    plan: Callable[[Problem, Mapping[str, int]], Choices]
    beside: Sequence[Batch] = ()
    _blocks: dict[str, tuple[float, float]] = field(default_factory=dict)
    _sensitivity: Sensitivity | None = None
    _answers: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def blocks(self, problem: Problem) -> dict[str, tuple[float, float]]:
        """Return, per unit, of the repeated block that holds it: the mean angle / pi between
        hidden states before and after, and their mean cosine (averaged over a unit's groups)."""
        if not self._blocks:
            paths = {path for g in self.solution.groups.values() if (path := block(g.name))}
            self._blocks = angles(self.module, sorted(paths), self.batches)
        found = {}
        for unit in problem.units:
            own = [self._blocks[path] for g in unit.groups
                   if (path := block(g.name)) in self._blocks]
            if own:
                found[unit.name] = tuple(sum(v) / len(own) for v in zip(*own, strict=True))
        if not found:
            raise SpaError("no repeated blocks were found", where=type(self.module).__name__,
                           why="this allocation compares the blocks of a list of modules",
                           fix="use another allocation")
        return found

    def salience(self, problem: Problem, *, step: float, batches: int,
                 seed: int = 0) -> dict[str, torch.Tensor]:
        """Return, per unit, |w g| of a sample of its block's weights, g without backward passes.

        g = z (L(w + step z) - L(w - step z)) / (2 step), z normal, all weights of a block at once.
        """
        found: dict[str, torch.Tensor] = {}
        for unit in problem.units:
            path = block(unit.groups[0].name)
            if path and path not in found:
                found[path] = self._salience(path, step, self.batches[:batches], seed)
        return {u.name: found[path] for u in problem.units
                if (path := block(u.groups[0].name))}

    @torch.no_grad()
    def _salience(self, path: str, step: float, batches: Sequence[Batch],
                  seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        arrays = {f"{path}.{n}": p for n, p in self.module.get_submodule(path).named_parameters()
                  if p.ndim > 1}
        noise = {n: torch.randn(p.shape, generator=generator) for n, p in arrays.items()}
        slope = 0.0
        for sign in (1, -1):
            moved = {n: p + sign * step * noise[n] for n, p in arrays.items()}
            slope += sign * self._loss(moved, batches) / (2 * step)
        parts = [(p.abs() * noise[n].abs() * abs(slope)).flatten() for n, p in arrays.items()]
        return torch.cat([part[:: max(1, len(part) // 10_000)] for part in parts])

    def _loss(self, arrays: Mapping[str, torch.Tensor], batches: Sequence[Batch]) -> float:
        total = 0.0
        with untouched(self.module):
            for args, kwargs in batches:
                made = torch.func.functional_call(self.module, dict(arrays), args,
                                                  inputs_only(self.module, kwargs))
                results = [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
                total += float(self.loss(results, args, kwargs)) / len(batches)
        return total

    @torch.no_grad()
    def lost(self, problem: Problem, kept: Mapping[str, int], batches: int,
             skip: int = 0) -> float:
        """Return the divergence from the dense network of one in which what goes reads as zero.

        A mean over the first `batches` of the calibration but for `skip`; nothing is repaired.
        """
        choices = self.plan(problem, kept)
        reads = masks(self.solution, choices) if choices else None
        dense, pruned = (Runner(self.trace.program, reads=how, double=self.trace.wide)
                         for how in (None, reads))
        some, total = self.batches[skip:batches], 0.0
        for args, kwargs in some:
            call = self.trace.match(args, kwargs)
            key = id(args), id(kwargs)
            if key not in self._answers:
                self._answers[key] = first_floating(dense.call(*call))
            total += float(distance(first_floating(pruned.call(*call)), self._answers[key]))
        return total / len(some)

    def changes(self, problem: Problem, kept: Mapping[str, int],
                moves: Mapping[str, Sequence[int]],
                batches: int) -> tuple[dict[tuple[str, int], Change], float]:
        """Return what each move (a unit to another count) does to the divergence of the pruned
        and repaired network from the dense one, and the divergence itself (see `sensitivity`).

        `batches` is how many count: half of them are the model's own text where it wrote some.
        """
        if self._sensitivity is None:
            self._sensitivity = Sensitivity(self.trace, self.solution, self._covariances(problem),
                                            draft(self.compensation), self.plan)
        own = self.beside[: batches // 2]
        some = [*self.batches[: batches - len(own)], *own]
        return self._sensitivity.changes(problem, kept, moves, some)

    def _covariances(self, problem: Problem) -> Scores:
        groups = [g for u in problem.units for g in u.groups]
        found, _ = sites(self.solution, self.plan(problem, problem.least()))
        if not all("covariance" in self.context.inputs(site.consumer) for site in found):
            self.context.calibrate({"covariance"}, self.batches, self.loss, groups=groups)
            self.context.widen({"covariance"}, self.beside, self.loss, groups)
        return self.context


@torch.no_grad()
def angles(module: nn.Module, paths: Sequence[str],
           batches: Sequence[Batch]) -> dict[str, tuple[float, float]]:
    """Return {path: (mean angle / pi, mean cosine)} of blocks that map a hidden state to one."""
    sums: dict[str, list[float]] = {}

    def see(path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
            out: object) -> None:
        before = args[0] if args else kwargs.get("hidden_states")
        after = first_floating(out if isinstance(out, (tuple, list)) else [out])
        if isinstance(before, torch.Tensor) and before.shape == after.shape:
            cosine = torch.cosine_similarity(before, after, -1).clamp(-1, 1).double()
            have = sums.setdefault(path, [0.0, 0.0, 0.0])
            have[0] += float(cosine.arccos().sum()) / pi
            have[1] += float(cosine.sum())
            have[2] += cosine.numel()

    with watched({path: module.get_submodule(path) for path in paths}, see):
        for args, kwargs in batches:
            module(*args, **inputs_only(module, kwargs))
    return {path: (a / n, c / n) for path, (a, c, n) in sums.items()}
