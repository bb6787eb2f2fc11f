"""The step that decides: how many slices each group keeps under the target, and the plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..axes.choices import Choices
from ..errors import TargetError, UsageError
from ..groups.cost import cost
from ..plan import legal as allocation
from ..plan.plan import costs, make_plan
from ..plan.problem import TOLERANCE, Problem, Unit, check_met
from ..plan.stock_units import expressible
from ..request.recipe import is_nearest, parse_target
from ..stages.records import Job
from ..torch_backend import unreached
from ..torch_backend.emit import stock
from ..torch_backend.kinds import is_hf
from ..torch_backend.machine import lanes


def decide(job: Job) -> None:
    """Allocate counts under the target (unless a schedule has) and make the plan."""
    r = job.recipe
    counts = job.counts or (allocate_counts(job) if job.candidates else {})
    job.plan = make_plan(job.candidates, job.scores, counts, target=r.target,
                         weights_hash=job.backend.digest(job), recipe=r.as_dict())
    job.choices = job.plan.choices(job.solution)
    job.uniform = job.uniform or (not job.candidates and is_hf(job.module))
    job.plan.costs.update(costs(job.solution, job.choices, job.whole))
    _tell_of_unreached(job)


def _tell_of_unreached(job: Job) -> None:
    """Note which sub-modules were not seen; warn of those that may not fit any more."""
    if isinstance(job.module, nn.Module) and job.choices:
        found = unreached.misfits(unreached.unreached(job.module, job.trace), job.solution,
                                  job.choices)
        job.notes.extend(found)
        for note in found:
            if "does not fit" in note:
                warnings.warn(note, stacklevel=2)


def is_met(job: Job) -> bool:
    """Whether the blocks that were dropped meet the target by themselves.

    Raises TargetError if less than the target is left without them.
    """
    if job.dropped is None:
        return False
    metric, share = parse_target(job.recipe.target)
    dense, left = job.whole[metric], cost(job.solution, metric).total
    if left < (share - TOLERANCE) * dense and not is_nearest(job.recipe.target):
        raise TargetError(
            f"target {job.recipe.target} is out of reach", where=job.name,
            why=f"without {len(job.dropped.paths)} blocks {left / dense:.1%} of {metric} remain",
            fix="drop fewer blocks")
    return left <= (share + TOLERANCE) * dense


def allocate_counts(job: Job) -> dict[str, int]:
    """Return how many slices each candidate keeps, by the allocation pass and the target.

    Raises TargetError if the target is missed.
    """
    r = job.recipe
    metric, share = parse_target(r.target)
    price = cost(job.solution, metric)
    dense = job.whole.get(metric, price.total)
    tried: list[tuple[float, _Layout, Problem, dict[str, int]]] = []
    for layout in _layouts(job):
        price.set({g.atom: g.size for g in job.candidates})
        problem = Problem(layout.units, price, share * dense, dense, metric,
                          measure=_measure(job), closest=is_nearest(r.target))
        kept = job.allocation.allocate(problem)
        tried.append((abs(problem.price(kept) - problem.target), layout, problem, kept))
        if problem.met(kept):
            break
    _, layout, problem, kept = min(tried, key=lambda one: one[0]) if problem.closest \
        else tried[-1]
    try:
        check_met(problem, kept, finest=r.align == 1)
    except TargetError as error:
        error.why += _of_unreached(job)
        raise
    job.uniform = layout.uniform
    job.notes.extend(layout.notes)
    if problem.closest and not problem.met(kept):
        job.notes.append(f"target {r.target}: the nearest that could be reached is "
                         f"{problem.price(kept) / dense:.1%}")
    return _counts(job, layout.units, kept)


def _of_unreached(job: Job) -> str:
    """Say how much lies in sub-modules that nothing was seen of."""
    if not isinstance(job.module, nn.Module):
        return ""
    found = unreached.unreached(job.module, job.trace)
    part = unreached.share(found, job.module)
    return "" if part < TOLERANCE else \
        f"; {part:.1%} of the parameters lie in {', '.join(list(found)[:3])}, which the example " \
        "inputs do not reach"


def _counts(job: Job, units: Iterable[Unit], kept: Mapping[str, int]) -> dict[str, int]:
    counts = {g.name: g.size for g in job.candidates}
    return counts | {g.name: kept[u.name] for u in units for g in u.groups}


def _measure(job: Job) -> Any:
    """What allocation passes may measure on a torch module: nothing is done until they ask."""
    if not isinstance(job.module, nn.Module):
        return None
    from ..trials.measure import Measure

    def choices(problem: Problem, kept: Mapping[str, int]) -> Choices:
        counts = _counts(job, problem.units, kept)
        return make_plan(job.candidates, job.scores, counts).choices(job.solution)

    return Measure(job.module, job.trace, job.solution, job.calibration.batches, job.loss,
                   statistics_of(job), job.compensation, choices, job.calibration.beside)


def statistics_of(job: Job) -> Any:
    """The context of the importance pass, for what it still holds, or a fresh one."""
    return job.context or job.backend.context(job)


class _Layout(NamedTuple):
    """What to allocate over, and what is to be said if it is."""

    uniform: bool
    units: tuple[Unit, ...]
    notes: list[str]


def _layouts(job: Job) -> Iterator[_Layout]:
    """Yield what to allocate over: first the units that a stock config can express, then all."""
    r = job.recipe

    def units(uniform: bool) -> tuple[Unit, ...]:
        return allocation.units(job.solution, job.candidates, job.scores, uniform=uniform,
                                align=r.align, lanes=lanes(), floor=r.floor,
                                absolute=getattr(job.importance, "absolute", False))

    if r.layout == "uniform" and not is_hf(job.module):
        raise UsageError("the uniform layout is for transformers models alone", where=job.name,
                         why=f"{type(job.module).__name__} has no configuration to say widths in",
                         fix="use layout any")
    uniform_first = is_hf(job.module) and not job.biased and r.layout in ("auto", "uniform")
    if uniform_first:
        every = units(True)
        found, notes = expressible(
            every, stock.fits(job.module, job.trace.tied, job.solution),
            type(job.module.config).__name__)
        if not found and r.layout == "uniform":
            why, fix = (notes[0], "use --layout any") if notes else \
                ("the floor and the steps leave every group its full size",
                 "lower --floor or --align") if every else \
                ("there is none", "let more go: --role, --only, --ignore")
            raise TargetError("no group can shrink in the uniform layout", why=why, fix=fix)
        if found:
            yield _Layout(True, tuple(found), [f"{note}; --layout any lets them go"
                                               for note in notes])
    if r.layout != "uniform":
        out = ["the target is out of reach of the uniform layout: layout any"] \
            if uniform_first else []
        yield _Layout(False, units(False), out)

