"""Which layout a plan is made for: over what to allocate, and whether unequal layers are worth it.

A transformers model is first allocated over units that all layers share, as then its own
configuration says the result and stock transformers loads it. Layers of their own widths lose
less, and load with a file beside the weights: `unequal` measures whether that is worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

from ..errors import SpaError, TargetError, UsageError
from ..plan import legal
from ..plan.problem import Problem, Unit
from ..plan.stock_units import expressible
from ..request.profiles import profile
from ..request.wishes import parse_wish
from ..stages.records import Request, Scored, Subject, Traced
from ..torch_backend.emit import stock
from ..torch_backend.emit.per_layer import Search
from ..torch_backend.kinds import is_hf
from ..torch_backend.machine import lanes
from ..torch_backend.own_layers import OwnSizes

WORTH = 0.9
"""Unequal layers are taken if they diverge from the dense network at most by this share of what
equal ones do: loading them takes a flag or a call more."""
LEEWAY = 1.1
"""How far the share on the first batch may be off: beyond that they are not looked at further."""
BATCHES, POSITIONS = 4, 512
HF_LAYOUTS = ("uniform", "per-layer")


class Layout(NamedTuple):
    """What to allocate over, in which layout a configuration may say it, what is said if it is."""

    stock: str
    units: tuple[Unit, ...]
    notes: list[str]


class Allocated(NamedTuple):
    """Counts under one layout, and how far from the target they cost."""

    layout: Layout
    problem: Problem
    kept: dict[str, int]
    miss: float
    met: bool

    def again(self) -> Problem:
        """The problem, priced at these counts once more (another may have been since)."""
        self.problem.price(self.kept)
        return self.problem


def allocated(ask: Request, layout: Layout, problem: Problem) -> Allocated:
    """Let the allocation pass find counts."""
    kept = ask.allocation.allocate(problem)
    return Allocated(layout, problem, kept, abs(problem.price(kept) - problem.target),
                     problem.met(kept))


def layouts(ask: Request, subject: Subject, traced: Traced, scored: Scored) -> Iterator[Layout]:
    """Yield what to allocate over, what loads most easily first.

    An allocation that goes layer by layer has nothing to do where all are alike.
    """
    asked = ask.recipe.layout
    if asked in HF_LAYOUTS and not is_hf(subject.model):
        raise UsageError(f"the {asked} layout is for transformers models alone", where=ask.name,
                         why=f"{type(subject.model).__name__} has no configuration to say widths "
                             "in", fix="use layout any")
    single = isinstance(subject.model, OwnSizes)
    if asked == "uniform" and single:
        raise UsageError("the uniform layout cannot say layers of widths of their own",
                         where=ask.name, why="the model given has them already",
                         fix="use --layout per-layer, or prune the model that it was made of")
    said = is_hf(subject.model) and not subject.biased and subject.factored is None
    own = getattr(ask.allocation, "by_layer", False)
    out: list[str] = []
    if said and not single and (asked == "uniform" or (asked == "auto" and not own)):
        found, notes = _expressible(ask, subject, traced, _units(ask, traced, scored, True))
        if found:
            yield Layout("uniform", found,
                         [f"{note}; --layout any lets them go" for note in notes])
        out = ["the target is out of reach of the uniform layout"]
    if said and asked in ("auto", "per-layer"):
        try:
            yield per_layer(ask, subject, traced, scored, out)
        except SpaError as problem:
            if asked == "per-layer":
                raise
            out = [*out, f"the per-layer layout cannot say it ({problem.why})"]
        else:
            out = [*out, "the target is out of reach of the per-layer layout"]
    if asked in ("auto", "any"):
        yield Layout("", _units(ask, traced, scored, False), _reason(out, "any"))


def _reason(out: list[str], layout: str) -> list[str]:
    return [f"{'; '.join(out)}: layout {layout}"] if out else []


def per_layer(ask: Request, subject: Subject, traced: Traced, scored: Scored,
              reasons: list[str]) -> Layout:
    """Return the units that configurations of single layers can express.

    Raises SpaError if there are none.
    """
    search = Search(subject.model, traced.trace.tied, traced.solution)
    found, notes = expressible(_units(ask, traced, scored, False), search.fit,
                               type(subject.model.config).__name__)
    if not found:
        raise TargetError("no group can shrink in the per-layer layout", where=ask.name,
                          why=notes[0] if notes else "every group stays whole",
                          fix="use --layout any")
    return Layout("per-layer", tuple(found), [
        *_reason(reasons, "per-layer"), *(f"{note}; --layout any lets them go" for note in notes)])


def unequal(ask: Request, subject: Subject, traced: Traced, scored: Scored, alike: Allocated,
            problem: Callable[[Layout], Problem]) -> Allocated:
    """Return counts of unequal layers where these lose clearly less than equal ones, else those.

    What is compared is the divergence of the masked network from the dense one, on calibration
    data; without real data, or if the user asked for either, nothing is.
    """
    measure: Any = alike.problem.measure
    if ask.recipe.layout != "auto" or measure is None or not ask.calibration.real \
            or ask.schedule is not None or getattr(ask.allocation, "alike", False):
        return alike
    try:
        other = per_layer(ask, subject, traced, scored, [])
        bound = LEEWAY * WORTH * measure.lost(alike.again(), alike.kept, 1)
        free = allocated(ask, other, replace(problem(other), bound=bound))
        far = not measure.lost(free.again(), free.kept, 1) <= bound
        count = 1 if far else measure.few(BATCHES, POSITIONS)
        lost = [measure.lost(one.again(), one.kept, count) for one in (alike, free)]
    except SpaError:
        return alike
    said = f"layers alike diverge by {lost[0]:.3g} from the dense network, unequal ones by " \
        f"{lost[1]:.3g}" + (" on the first batch" if far else "")
    if free.met and not far and all(map(isfinite, lost)) and lost[1] <= WORTH * lost[0]:
        other.notes.append(f"layout per-layer: {said}; --layout uniform keeps them alike")
        return free
    alike.layout.notes.append(f"layout uniform: {said}; --layout per-layer insists on those")
    return alike


def _units(ask: Request, traced: Traced, scored: Scored, uniform: bool) -> tuple[Unit, ...]:
    r = ask.recipe
    return legal.under(legal.units(
        traced.solution, scored.candidates, scored.scores, uniform=uniform, align=r.align,
        lanes=r.lanes or profile(r.runtime).lanes or lanes(), floor=r.floor,
        absolute=getattr(scored.importance, "absolute", False)), [parse_wish(t) for t in r.keep])


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
