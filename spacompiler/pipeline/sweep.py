"""Several sizes of one model: traced once, scored once, then decided, repaired and judged each.

What a size costs besides is a compile's tail without proof and files; the winner is compiled in
full afterwards, by the recipe that a sweep gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from math import exp, isfinite
from typing import Any, Protocol

from ..errors import SpaError, UsageError
from ..request.recipe import Recipe
from ..stages.records import Decided, Emitted, Request, Scored, Subject, Traced
from ..system.staging import Scratch
from . import finish, prepare, timing
from .analyse import analyse
from .decide import decide, statistics_of
from .quality import judge
from .resolved import resolved
from .run import STAGES, Walk
from .score import HELD, score

Evaluate = Callable[[Any], float]
"""What the user goes by: a module in, a number out, more is better."""


class Repaired(Protocol):
    """A traced program whose arrays a repair replaces: where they lie, and which were replaced."""

    repaired: Any

    @property
    def homes(self) -> Sequence[dict[str, Any]]:
        """Where the arrays lie that a repair puts others in place of."""


@dataclass(frozen=True)
class Point:
    """One size: what it costs, {metric: {dense, pruned}}, and how good it is.

    `lost` is the share of the dense network's quality that is gone, below 0 where it became
    better. `latency` is the share of its time that is left, None where it was not asked for; `why`
    says why a size could not be reached.
    """

    target: str
    costs: Mapping[str, Mapping[str, int]]
    recipe: Recipe
    lost: float = float("inf")
    score: float | None = None
    quality: Mapping[str, Any] | None = None
    latency: float | None = None
    why: str = ""


def sweep(ask: Request, subject: Subject, targets: Sequence[str], evaluate: Evaluate | None, *,
          timed: bool = False) -> tuple[list[Point], float | None]:
    """Return a point for each target, and the dense network's score (None without `evaluate`).

    Raises UsageError for what cannot be swept: schedules, dropped blocks, recovery.
    """
    _check(ask)
    do = Walk(ask, subject, STAGES)
    subject = do("merging adapters", prepare.merge_adapters, ask, subject)
    subject = do("checking weights", prepare.check_weights, ask, subject)
    if "continuing text" in do.stages:
        ask = do("continuing text", prepare.write_on, ask, subject)
    ask, subject, traced = do("tracing and solving axes", analyse, ask, subject)
    do.knowing(ask, traced)
    scored = do("scoring", score, ask, subject, traced)
    scored = _with_covariances(ask, subject, traced, scored)
    dense = None if evaluate is None else _evaluated(evaluate, subject, subject.model)
    points = []
    for target in targets:
        at = replace(ask, recipe=ask.recipe.but({"target": target}), notes=[])
        points.append(do("allocating", _point, at, subject, traced, scored,
                         evaluate, dense, timed))
    return points, dense


def _with_covariances(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Scored:
    """Gather once what the repair of each size reads of the dense network, where it can be held."""
    once = getattr(ask.compensation, "weights", True) \
        and not getattr(ask.compensation, "sequential", False)
    if ask.compensation is None or not once:
        return scored
    context = statistics_of(ask, subject, traced, scored)
    missing = [g for g in scored.candidates if context.measurable(g)
               and not all("covariance" in view.found for view in context.consumers(g))]
    if missing and context.covariance_bytes(scored.candidates) <= HELD:
        context.calibrate({"covariance"}, ask.calibration.for_repair, ask.loss, groups=missing)
    return replace(scored, context=context)


def winner(points: Sequence[Point], allow: float) -> Point | None:
    """Return the smallest point that lost no more than a share; None where all lost more."""
    good = [p for p in points if not p.why and p.lost <= allow]
    return min(good, key=lambda p: p.costs["params"]["pruned"], default=None)


def _check(ask: Request) -> None:
    odd = {"a schedule": ask.schedule is not None, "dropped blocks": bool(ask.recipe.blocks),
           "layers as products": bool(ask.recipe.low_rank),
           "recovery": ask.recovery is not None, "a kept adapter": ask.recipe.keep_adapter}
    for what, given in odd.items():
        if given:
            raise UsageError(f"a sweep cannot be made with {what}",
                             why="its sizes share one trace and one scoring, and train nothing",
                             fix="compile each size by itself")


def _point(ask: Request, subject: Subject, traced: Traced, scored: Scored,
           evaluate: Evaluate | None, dense: float | None, timed: bool) -> Point:
    recipe = resolved(ask, scored.importance)
    try:
        with _as_read(traced.trace):
            decided = decide(ask, subject, traced, scored)
            if ask.compensation is not None:
                decided = finish.repair(ask, subject, scored, decided)
            emitted = finish.emit(ask, replace(subject, owned=False), decided)
            found = Point(ask.recipe.target, decided.plan.costs, recipe)
            return _judged(found, ask, emitted, evaluate, dense, _time(
                ask, subject, traced, scored, decided) if timed else None)
    except UsageError:
        raise
    except SpaError as problem:
        return Point(ask.recipe.target, {}, recipe, why=f"{problem.what}: {problem.why}")


def _evaluated(evaluate: Evaluate, subject: Subject, model: object) -> float:
    """What the user's function says of a model."""
    with Scratch() as folder:
        return float(evaluate(subject.backend.module(model, folder)))


@contextlib.contextmanager
def _as_read(trace: Repaired) -> Iterator[None]:
    """Give a program the arrays that it was read with back, after a repair."""
    held, repaired = [dict(home) for home in trace.homes], copy(trace.repaired)
    try:
        yield
    finally:
        for home, was in zip(trace.homes, held, strict=True):
            home.update(was)
        trace.repaired.clear()
        trace.repaired.update(repaired)


def _judged(point: Point, ask: Request, emitted: Emitted, evaluate: Evaluate | None,
            dense: float | None, latency: float | None) -> Point:
    quality = judge(ask, emitted) if evaluate is None else None
    if evaluate is not None and dense is not None:
        reached = _evaluated(evaluate, emitted.subject, emitted.model)
        return replace(point, score=reached, latency=latency,
                       lost=(dense - reached) / (abs(dense) or 1.0))
    return replace(point, quality=quality, latency=latency, lost=_lost(quality or {}))


def _lost(quality: Mapping[str, Any]) -> float:
    """By how much perplexity rose, where there is a loss; else the share of changed answers."""
    if loss := quality.get("loss"):
        rise = loss["pruned"] - loss["dense"]
        return exp(rise) - 1 if isfinite(rise) and rise < 50 else float("inf")
    return 1.0 - float(quality["agreement"])


def _time(ask: Request, subject: Subject, traced: Traced, scored: Scored,
          decided: Decided) -> float:
    counts = {g.name: g.size for g in scored.candidates}
    counts |= {g.name: decided.choices[g.atom].count for g in scored.candidates
               if g.atom in decided.choices}
    return timing.share(ask, subject, traced, scored, counts)
