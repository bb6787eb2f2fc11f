"""The step that decides: how many slices each group keeps under the target, and the plan."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..axes.choices import Choices
from ..errors import TargetError, UsageError
from ..groups.cost import cost
from ..groups.solution import Solution
from ..plan import legal
from ..plan.plan import costs, make_plan
from ..plan.problem import MISS, Problem, Unit, check_met
from ..plan.stock_units import expressible
from ..request.recipe import is_nearest, parse_target
from ..stages.records import Decided, Request, Scored, Subject, Traced
from ..torch_backend import unreached
from ..torch_backend.emit import stock
from ..torch_backend.kinds import is_hf
from ..torch_backend.machine import lanes


def decide(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Decided:
    """Allocate counts under the target (unless a schedule has) and make the plan.

    Raises TargetError if the target is missed.
    """
    r = ask.recipe
    counts, uniform = dict(scored.counts), scored.uniform
    if not counts and scored.candidates:
        counts, uniform = allocate_counts(ask, subject, traced, scored)
    plan = make_plan(scored.candidates, scored.scores, counts, target=r.target,
                     weights_hash=subject.backend.digest(subject.model), recipe=r.as_dict())
    choices = plan.choices(traced.solution)
    if not choices and scored.candidates and subject.dropped is None:
        raise TargetError(f"target {r.target} takes nothing away", where=ask.name,
                          why="what is whole lies nearer to it than one slice less does",
                          fix="let less stay, or take finer steps: --align 1")
    plan.costs.update(costs(traced.solution, choices, subject.whole))
    _tell_of_unreached(ask, subject, traced, choices)
    return Decided(traced.trace, traced.solution, plan, choices,
                   uniform or (not scored.candidates and is_hf(subject.model)))


def _tell_of_unreached(ask: Request, subject: Subject, traced: Traced, choices: Choices) -> None:
    """Note which sub-modules were not seen; warn of those that may not fit any more."""
    if isinstance(subject.model, nn.Module) and choices:
        found = unreached.misfits(unreached.unreached(subject.model, traced.trace),
                                  traced.solution, choices)
        ask.notes.extend(found)
        for note in found:
            if "does not fit" in note:
                warnings.warn(note, stacklevel=2)


def is_met(ask: Request, subject: Subject, solution: Solution) -> bool:
    """Whether the blocks that were dropped meet the target by themselves.

    Raises TargetError if less than the target is left without them.
    """
    if subject.dropped is None:
        return False
    metric, share = parse_target(ask.recipe.target)
    dense, left = subject.whole[metric], cost(solution, metric).total
    if left < (share - MISS) * dense and not is_nearest(ask.recipe.target):
        raise TargetError(
            f"target {ask.recipe.target} is out of reach", where=ask.name,
            why=f"without {len(subject.dropped.paths)} blocks {left / dense:.1%} of {metric} "
                "remain", fix="drop fewer blocks")
    return left <= (share + MISS) * dense


def allocate_counts(ask: Request, subject: Subject, traced: Traced,
                    scored: Scored) -> tuple[dict[str, int], bool]:
    """Return how many slices each candidate keeps, by the allocation pass and the target.

    And whether a stock configuration can express that. Raises TargetError if the target is missed.
    """
    metric, share = parse_target(ask.recipe.target)
    price = cost(traced.solution, metric)
    dense = subject.whole.get(metric, price.total)
    tried: list[tuple[float, _Layout, Problem, dict[str, int]]] = []
    for layout in _layouts(ask, subject, traced, scored):
        price.set({g.atom: g.size for g in scored.candidates})
        problem = Problem(layout.units, price, share * dense, dense, metric,
                          measure=_measure(ask, subject, traced, scored),
                          closest=is_nearest(ask.recipe.target))
        kept = ask.allocation.allocate(problem)
        tried.append((abs(problem.price(kept) - problem.target), layout, problem, kept))
        if problem.met(kept):
            break
    _, layout, problem, kept = min(tried, key=lambda one: one[0]) if problem.closest \
        else tried[-1]
    try:
        check_met(problem, kept, finest=ask.recipe.align == 1)
    except TargetError as error:
        error.why += _of_unreached(subject, traced)
        raise
    ask.notes.extend((*layout.notes, *problem.notes))
    if problem.closest and not problem.met(kept):
        ask.notes.append(f"target {ask.recipe.target}: the nearest that could be reached is "
                         f"{problem.price(kept) / dense:.1%}")
    return _counts(scored, layout.units, kept), layout.uniform


def _of_unreached(subject: Subject, traced: Traced) -> str:
    """Say how much lies in sub-modules that nothing was seen of."""
    if not isinstance(subject.model, nn.Module):
        return ""
    found = unreached.unreached(subject.model, traced.trace)
    part = unreached.share(found, subject.model)
    return "" if part < MISS else \
        f"; {part:.1%} of the parameters lie in {', '.join(list(found)[:3])}, which the example " \
        "inputs do not reach"


def _counts(scored: Scored, units: Iterable[Unit], kept: Mapping[str, int]) -> dict[str, int]:
    counts = {g.name: g.size for g in scored.candidates}
    return counts | {g.name: kept[u.name] for u in units for g in u.groups}


def _measure(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Any:
    """What allocation passes may measure on a torch module: nothing is done until they ask."""
    if not isinstance(subject.model, nn.Module):
        return None
    from ..trials.measure import Measure

    def choices(problem: Problem, kept: Mapping[str, int]) -> Choices:
        counts = _counts(scored, problem.units, kept)
        return make_plan(scored.candidates, scored.scores, counts).choices(traced.solution)

    return Measure(subject.model, traced.trace, traced.solution, ask.calibration.batches, ask.loss,
                   statistics_of(ask, subject, traced, scored), ask.compensation, choices,
                   ask.calibration.beside)


def statistics_of(ask: Request, subject: Subject, traced: Traced | Decided, scored: Scored) -> Any:
    """The context of the importance pass, for what it still holds, or a fresh one."""
    return scored.context or subject.backend.context(traced.trace, traced.solution,
                                                     ask.recipe.seed)


class _Layout(NamedTuple):
    """What to allocate over, and what is to be said if it is."""

    uniform: bool
    units: tuple[Unit, ...]
    notes: list[str]


def _layouts(ask: Request, subject: Subject, traced: Traced,
             scored: Scored) -> Iterator[_Layout]:
    """Yield what to allocate over: first the units that a stock config can express, then all."""
    r = ask.recipe

    def units(uniform: bool) -> tuple[Unit, ...]:
        return legal.units(traced.solution, scored.candidates, scored.scores, uniform=uniform,
                           align=r.align, lanes=lanes(), floor=r.floor,
                           absolute=getattr(scored.importance, "absolute", False))

    if r.layout == "uniform" and not is_hf(subject.model):
        raise UsageError("the uniform layout is for transformers models alone", where=ask.name,
                         why=f"{type(subject.model).__name__} has no configuration to say widths "
                             "in", fix="use layout any")
    stock_first = is_hf(subject.model) and not subject.biased and r.layout in ("auto", "uniform")
    if stock_first:
        found, notes = _expressible(ask, subject, traced, units(True))
        if found:
            yield _Layout(True, found, [f"{note}; --layout any lets them go" for note in notes])
    if r.layout != "uniform":
        out = ["the target is out of reach of the uniform layout: layout any"] \
            if stock_first else []
        yield _Layout(False, units(False), out)


def _expressible(ask: Request, subject: Subject, traced: Traced,
                 every: tuple[Unit, ...]) -> tuple[tuple[Unit, ...], list[str]]:
    """The units that a stock config can express, and notes on others.

    Raises TargetError if it must and can't.
    """
    found, notes = expressible(
        every, stock.fits(subject.model, traced.trace.tied, traced.solution),
        type(subject.model.config).__name__)
    if not found and ask.recipe.layout == "uniform":
        why, fix = (notes[0], "use --layout any") if notes else \
            ("the floor and the steps leave every group its full size",
             "lower --floor or --align") if every else \
            ("there is none", "let more go: --role, --only, --ignore")
        raise TargetError("no group can shrink in the uniform layout", why=why, fix=fix)
    return tuple(found), notes
