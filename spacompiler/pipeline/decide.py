"""The step that decides: how many slices each group keeps under the target, and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from torch import nn

from ..axes.choices import Choices
from ..errors import TargetError
from ..groups.cost import Cost, cost
from ..groups.solution import Solution
from ..plan.plan import costs, make_plan
from ..plan.problem import MISS, Limit, Measured, Problem, Unit, check_met
from ..request.targets import (
    METRICS,
    Target,
    is_nearest,
    parse_shares,
    parse_target,
    parse_targets,
)
from ..stages.records import Decided, Request, Scored, Subject, Traced
from ..system.group import here
from ..system.process import warn_user
from ..torch_backend import unreached
from ..torch_backend.kinds import is_hf
from . import keep, timing
from .layouts import Allocated, Layout, allocated, layouts, unequal
from .resolved import resolved


def decide(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Decided:
    """Allocate counts under the target (unless a schedule has) and make the plan.

    Raises TargetError if the target is missed.
    """
    r = ask.recipe
    counts, layout = dict(scored.counts), scored.stock
    if not counts and scored.candidates:
        counts, layout = keep.counts(ask, lambda: allocate_counts(ask, subject, traced, scored))
    plan = make_plan(scored.candidates, scored.scores, counts, target=r.target,
                     weights_hash=subject.backend.digest(subject.model),
                     recipe=resolved(ask, scored.importance).as_dict())
    here().agree(sha256(plan.to_json().encode()).hexdigest(), "the plan")
    choices = plan.choices(traced.solution)
    if not choices and scored.candidates and not subject.reduced:
        raise TargetError(f"target {r.target} takes nothing away", where=ask.name,
                          why="what is whole lies nearer to it than one slice less does",
                          fix="let less stay, or take finer steps: --align 1")
    plan.costs.update(costs(traced.solution, choices, subject.whole, [
        (t.metric, t.batch * t.length) for t in parse_targets(r.target)
        if t.metric not in (*METRICS, "latency")]))
    _tell_of_unreached(ask, subject, traced, choices)
    if not scored.candidates and is_hf(subject.model) and subject.factored is None:
        layout = "uniform"
    return Decided(traced.trace, traced.solution, plan, choices, layout, room=subject.room)


def _tell_of_unreached(ask: Request, subject: Subject, traced: Traced, choices: Choices) -> None:
    """Note which sub-modules were not seen; warn of those that may not fit any more."""
    if isinstance(subject.model, nn.Module) and choices:
        found = unreached.misfits(unreached.unreached(subject.model, traced.trace),
                                  traced.solution, choices)
        ask.notes.extend(found)
        for note in found:
            if "does not fit" in note:
                warn_user(note)


def is_met(ask: Request, subject: Subject, solution: Solution) -> bool:
    """Whether what went before widths (blocks, ranks) meets the target by itself.

    Raises TargetError if less than the target is left without them.
    """
    if not subject.reduced:
        return False
    over = {t.metric: cost(solution, t.metric).total / subject.whole[t.metric] - t.amount
            for t in parse_shares(ask.recipe.target)}
    if max(over.values()) < -MISS and not is_nearest(ask.recipe.target):
        left = ", ".join(f"{t.amount + over[t.metric]:.1%} of {t.metric}"
                         for t in parse_shares(ask.recipe.target))
        raise TargetError(
            f"target {ask.recipe.target} is out of reach", where=ask.name,
            why=f"without what went before widths {left} remain",
            fix="drop fewer blocks, or let more stay of layers: --drop-blocks, --low-rank")
    return max(over.values()) <= MISS


Counts = tuple[dict[str, int], str]
"""How many slices each candidate keeps, and the layout of transformers that may say it."""


def allocate_counts(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Counts:
    """Return how many slices each candidate keeps, by the allocation pass and the target.

    And in which layout a configuration of transformers may express that, "" in none. Of several
    limits the one is met that the others hold under. Raises TargetError if the target is missed.
    """
    targets = parse_targets(ask.recipe.target)
    if len(targets) == 1:
        return _by(targets[0], ask, subject, traced, scored)
    return _within_all(targets, ask, subject, traced, scored)


def _by(target: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
        others: Sequence[Target] = ()) -> Counts:
    """Meet one limit; passes that look at `others` hold them too."""
    if target.metric == "latency":
        def at(share: float, notes: list[str]) -> Counts:
            return meet(replace(target, metric="macs", amount=share, absolute=False, nearest=True),
                        replace(ask, notes=notes), subject, traced, scored, others)

        return timing.meet(target, at, ask, subject, traced, scored)
    return meet(target, ask, subject, traced, scored, others)


def _within_all(targets: Sequence[Target], ask: Request, subject: Subject, traced: Traced,
                scored: Scored) -> Counts:
    """Meet one of several limits, under which all others hold, and say which one binds."""
    why: dict[str, str] = {}
    for target in targets:
        notes: list[str] = []
        try:
            counts, layout = _by(target, replace(ask, notes=notes), subject, traced, scored,
                                 [other for other in targets if other is not target])
        except TargetError as problem:
            why[target.metric] = problem.why
            continue
        broken = [other.metric for other in targets if other is not target
                  and not _holds(other, ask, subject, traced, scored, counts)]
        if not broken:
            bind = [t.metric for t in targets
                    if _binds(t, subject, traced, scored, counts)] or [target.metric]
            loose = ", ".join(t.metric for t in targets if t.metric not in bind)
            ask.notes.extend([*notes, f"of the limits {ask.recipe.target}, {' and '.join(bind)} "
                              f"bind{'s' * (len(bind) == 1)}"
                              + (f": {loose} hold under it" if loose else "")])
            return counts, layout
        why[target.metric] = f"where it is met, {', '.join(broken)} is not"
    raise TargetError(f"target {ask.recipe.target} cannot be met", where=ask.name,
                      why="; ".join(f"{metric}: {reason}" for metric, reason in why.items()),
                      fix="let more of one of them stay, or let more go: --role, --only, --floor")


def _holds(limit: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
           counts: Mapping[str, int]) -> bool:
    """Whether a limit holds under counts."""
    if limit.metric == "latency":
        return timing.holds(limit, ask, subject, traced, scored, counts)
    return _over(limit, subject, traced, scored, counts) <= MISS


def _binds(limit: Target, subject: Subject, traced: Traced, scored: Scored,
           counts: Mapping[str, int]) -> bool:
    """Whether a limit that can be counted leaves no more than counts take."""
    return limit.metric != "latency" and abs(_over(limit, subject, traced, scored, counts)) <= MISS


def _over(limit: Target, subject: Subject, traced: Traced, scored: Scored,
          counts: Mapping[str, int]) -> float:
    """By what share of the dense cost counts go beyond a limit."""
    price = cost(traced.solution, limit.metric, limit.batch * limit.length)
    dense = subject.whole.get(limit.metric, price.total)
    left = price.set({g.atom: counts[g.name] for g in scored.candidates})
    return float(left - limit.of(dense)) / dense


def meet(target: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
         others: Sequence[Target] = ()) -> Counts:
    """Allocate under one limit of what can be counted; raises TargetError if it is missed."""
    price = cost(traced.solution, target.metric, target.batch * target.length)
    measure = _measure(ask, subject, traced, scored)

    def problem(layout: Layout) -> Problem:
        made = _problem(ask, target, subject, traced, scored, layout, price, measure)
        return replace(made, limits=_limits(others, subject, traced, scored))

    tried: list[Allocated] = []
    for layout in layouts(ask, subject, traced, scored):
        tried.append(allocated(ask, layout, problem(layout)))
        if tried[-1].met:
            break
    taken = min(tried, key=lambda one: one.miss) if target.nearest else tried[-1]
    if taken.met and taken.layout.stock == "uniform":
        taken = unequal(ask, subject, traced, scored, taken, problem)
    try:
        check_met(taken.again(), taken.kept, finest=ask.recipe.align == 1)
    except TargetError as error:
        error.why += _of_unreached(subject, traced)
        raise
    _tell(ask, taken)
    return _counts(scored, taken.layout.units, taken.kept), taken.layout.stock


def problems_of(ask: Request, subject: Subject, traced: Traced,
                scored: Scored) -> list[tuple[Problem, str]]:
    """Return the problem of each layout that reaches down to the target, of the last one at least.

    And in which layout a configuration of transformers may express what solves it. Whether layers
    go by themselves is the schedule's to say.
    """
    measure = _measure(ask, subject, traced, scored)
    target = _of_schedule(ask)
    found = []
    for layout in layouts(replace(ask, allocation=ask.schedule), subject, traced, scored):
        problem = _problem(ask, target, subject, traced, scored, layout,
                           cost(traced.solution, target.metric), measure)
        problem.notes.extend(layout.notes)
        found.append((problem, layout.stock))
    return [one for one in found if one[0].price(one[0].least()) <= one[0].target] or found[-1:]


def _of_schedule(ask: Request) -> Target:
    """The limit that a schedule goes by: one share. Of those that ask for counts at the end, as
    the allocation finds them under all limits, the first share that can be counted."""
    targets = parse_targets(ask.recipe.target)
    shares = [t for t in targets if t.metric in METRICS and not t.absolute]
    if not (shares and getattr(ask.schedule, "allocates", False)):
        parse_target(ask.recipe.target)
    return shares[0]


def _problem(ask: Request, target: Target, subject: Subject, traced: Traced, scored: Scored,
             layout: Layout, price: Cost, measure: Measured | None) -> Problem:
    """The allocation problem over the units of a layout, on the network as it is."""
    price.set({g.atom: g.size for g in scored.candidates})
    dense = subject.whole.get(target.metric, price.total)
    shapes = {name: t.shape for name, t in traced.solution.graph.weights().items()}
    by = scored.importance
    losses = "exact" if getattr(by, "absolute", False) else \
        "comparable" if getattr(by, "comparable", False) else "unlike"
    return Problem(layout.units, price, target.of(dense), dense, target.metric, measure=measure,
                   closest=target.nearest, shapes=shapes, losses=losses,
                   criterion=getattr(by, "name", ""), on_data=ask.calibration.real)


def _limits(others: Sequence[Target], subject: Subject, traced: Traced,
            scored: Scored) -> tuple[Limit, ...]:
    """Limits beside the target that can be counted."""
    found = []
    for other in others:
        if other.metric == "latency":
            continue
        price = cost(traced.solution, other.metric, other.batch * other.length)
        price.set({g.atom: g.size for g in scored.candidates})
        dense = subject.whole.get(other.metric, price.total)
        found.append(Limit(other.metric, price, other.of(dense), dense))
    return tuple(found)


def _tell(ask: Request, taken: Allocated) -> None:
    problem = taken.problem
    ask.notes.extend((*taken.layout.notes, *problem.notes))
    asked = {t.metric for t in parse_targets(ask.recipe.target)}  # MACs stand in for times
    if problem.closest and problem.metric in asked and not problem.met(taken.kept):
        ask.notes.append(f"target {ask.recipe.target}: the nearest that could be reached is "
                         f"{problem.price(taken.kept) / problem.dense:.1%}")


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
    """What allocation passes may measure: nothing is done until they ask. Of a file only what
    forward passes say, for passes that say that they know of it."""
    def choices(problem: Problem, kept: Mapping[str, int]) -> Choices:
        counts = _counts(scored, problem.units, kept)
        return make_plan(scored.candidates, scored.scores, counts).choices(traced.solution)

    common = (traced.solution, ask.calibration.batches, ask.loss, choices)
    if isinstance(subject.model, nn.Module):
        from ..trials.measure import Measure

        return Measure(*common, subject.model, traced.trace,
                       statistics_of(ask, subject, traced, scored), ask.compensation,
                       ask.calibration.beside)
    if getattr(ask.allocation, "on_files", False):
        from ..trials.file_measure import FileMeasure

        return FileMeasure(*common, traced.trace)
    return None


def statistics_of(ask: Request, subject: Subject, traced: Traced | Decided, scored: Scored) -> Any:
    """The context of the importance pass, for what it still holds, or a fresh one."""
    return scored.context or subject.backend.context(traced.trace, traced.solution,
                                                     ask.recipe.seed)
