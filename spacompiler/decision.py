"""The step that decides: how many slices each group keeps under the target, and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import allocation
from .choices import Choices
from .cost import cost
from .emit import hf
from .errors import TargetError
from .groups import Solution
from .job import Job
from .plan import make_plan
from .recipe import METRICS, parse_target


def decide(job: Job) -> None:
    """Allocate counts under the target (unless a schedule has) and make the plan."""
    r = job.recipe
    counts = job.counts or (allocate_counts(job) if job.candidates else {})
    job.plan = make_plan(job.candidates, job.scores, counts, target=r.target,
                         weights_hash=job.backend.digest(job), recipe=r.as_dict())
    job.choices = job.plan.choices(job.solution)
    job.uniform = job.uniform or (not job.candidates and hf.is_hf(job.module))
    job.plan.costs.update(costs(job.solution, job.choices, job.whole))


def is_met(job: Job) -> bool:
    """Whether the blocks that were dropped meet the target by themselves.

    Raises TargetError if less than the target is left without them.
    """
    if job.dropped is None:
        return False
    metric, share = parse_target(job.recipe.target)
    dense, left = job.whole[metric], cost(job.solution, metric).total
    if left < (share - allocation.TOLERANCE) * dense:
        raise TargetError(
            f"target {job.recipe.target} is out of reach", where=job.name,
            why=f"without {len(job.dropped.paths)} blocks {left / dense:.1%} of {metric} remain",
            fix="drop fewer blocks")
    return left <= (share + allocation.TOLERANCE) * dense


def allocate_counts(job: Job) -> dict[str, int]:
    """Return how many slices each candidate keeps, by the allocation pass and the target.

    Raises TargetError if the target is missed.
    """
    r = job.recipe
    metric, share = parse_target(r.target)
    price = cost(job.solution, metric)
    dense = job.whole.get(metric, price.total)
    for found in _units(job):
        price.set({g.atom: g.size for g in job.candidates})
        problem = allocation.Problem(found, price, share * dense, dense, metric,
                                     measure=_measure(job))
        kept = job.allocation.allocate(problem)
        if problem.met(kept):
            break
        job.uniform = False
    allocation.check_met(problem, kept, finest=r.align == 1)
    return _counts(job, found, kept)


def _counts(job: Job, units: Iterable[allocation.Unit], kept: Mapping[str, int]) -> dict[str, int]:
    counts = {g.name: g.size for g in job.candidates}
    return counts | {g.name: kept[u.name] for u in units for g in u.groups}


def _measure(job: Job) -> Any:
    """What allocation passes may measure on a torch module: nothing is done until they ask."""
    if not isinstance(job.module, nn.Module):
        return None
    from .measure import Measure

    def choices(problem: allocation.Problem, kept: Mapping[str, int]) -> Choices:
        counts = _counts(job, problem.units, kept)
        return make_plan(job.candidates, job.scores, counts).choices(job.solution)

    return Measure(job.module, job.trace, job.solution, job.calibration.batches, job.loss,
                   statistics_of(job), job.compensation, choices, job.calibration.beside)


def statistics_of(job: Job) -> Any:
    """The context of the importance pass, for what it still holds, or a fresh one."""
    return job.context or job.backend.context(job)


def _units(job: Job) -> Iterator[tuple[allocation.Unit, ...]]:
    """Yield what to allocate over: first the units that a stock config can express, then all."""
    r = job.recipe

    def units(uniform: bool) -> tuple[allocation.Unit, ...]:
        return allocation.units(job.solution, job.candidates, job.scores, uniform=uniform,
                                align=r.align, lanes=lanes(), floor=r.floor,
                                absolute=getattr(job.importance, "absolute", False))

    stock = hf.is_hf(job.module) and not job.biased and r.layout in ("auto", "uniform")
    if stock:
        every = units(True)
        found, notes = hf.expressible(job.module, job.trace.tied, job.solution, every)
        job.notes.extend(notes)
        if not found and r.layout == "uniform":
            why, fix = (notes[0], "use --layout any") if notes else \
                ("the floor and the steps leave every group its full size",
                 "lower --floor or --align") if every else \
                ("there is none", "let more go: --role, --only, --ignore")
            raise TargetError("no group can shrink in the uniform layout", why=why, fix=fix)
        if found:
            job.uniform = True
            yield tuple(found)
    if r.layout != "uniform":
        if stock:
            job.notes.append("the target is out of reach of the uniform layout: layout any")
        yield units(False)


def costs(solution: Solution, choices: Choices,
          whole: Mapping[str, int] | None = None) -> dict[str, dict[str, int]]:
    """Return {metric: {dense, pruned}} for every metric; `whole` are the costs of the dense
    network where it has blocks that the solution's lacks."""
    found = {}
    for metric in METRICS:
        price = cost(solution, metric)
        dense = (whole or {}).get(metric, price.total)
        pruned = price.set({atom: choice.count for atom, choice in choices.items()})
        found[metric] = {"dense": dense, "pruned": pruned}
    return found


def lanes() -> int:
    """Return the channel block of this CPU's convolutions: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
