"""Score every candidate: by calibration data, by weights alone, or by a schedule that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, count
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import SpaError, UsageError
from ..evidence.calls import Batch, amount, first
from ..evidence.protocol import Context, Importance
from ..evidence.scores import Scores
from ..evidence.statistics import forward_only
from ..groups.solution import Group
from ..stages.records import Request, Scheduling, Scored, Subject, Traced
from ..system.group import here
from ..system.pace import Pace
from ..torch_backend.backend import TORCH
from ..torch_backend.gather.heads import Fitting
from . import defaults, keep
from .decide import allocate_counts, problems_of


def score(ask: Request, subject: Subject, traced: Traced) -> Scored:
    """Run calibration if the importance pass needs it, then score every candidate.

    A schedule trains instead, and leaves scores and counts.
    """
    if not traced.candidates:
        return Scored(ask.importance)
    if ask.schedule is not None:
        return _scheduled(ask, subject, traced)
    importance = defaults.settled(ask, subject, traced)
    if "adapter_steps" in importance.needs:
        _note_local(ask, importance.name)
    context = _context(importance, subject, traced, ask.recipe.seed)
    context.expect(traced.candidates)
    scored = Scored(importance, traced.candidates, context=context)

    def look() -> dict[str, np.ndarray]:
        with _seen_by_all(ask, traced):
            return {group.name: _checked(importance, group, context)
                    for group in _calibrated(ask, scored, context)}

    try:
        scores = keep.scores(ask, context, look)
    finally:
        getattr(context, "close", lambda: None)()
    kept = None if "adapter_steps" in importance.needs else context
    return replace(scored, scores=scores, context=kept)


@contextmanager
def _seen_by_all(ask: Request, traced: Traced) -> Iterator[None]:
    """Let the loss know of the batches that other processes run, in the order of all."""
    used = list(ask.loss.used) if isinstance(ask.loss, Fitting) else []
    yield
    if here().size > 1 and isinstance(ask.loss, Fitting) and ask.loss.used != used:
        ask.loss.used[:] = used
        for batch in ask.calibration.batches:
            ask.loss.saw(*traced.trace.labelled(*batch))


def _note_local(ask: Request, name: str) -> None:
    """Say that a pass trains on the processor where another device was asked for."""
    if not ask.where.local:
        ask.notes.append(f"{name} trains on the processor: {ask.where.device} computes the rest")


def _scheduled(ask: Request, subject: Subject, traced: Traced) -> Scored:
    assert ask.schedule is not None
    _note_local(ask, ask.schedule.name)
    found: Scored = ask.schedule.run(scheduling(ask, subject, traced))
    # where the allocation finds counts, it goes by the criterion that scored
    return replace(found, importance=ask.importance) if found.counts else found


def scheduling(ask: Request, subject: Subject, traced: Traced) -> Scheduling:
    """What a schedule is given."""
    def scored(candidates: Sequence[Group], scores: Mapping[str, np.ndarray]) -> Scored:
        return Scored(ask.importance, tuple(candidates), scores)

    return Scheduling(
        subject.model, traced.trace, traced.solution, traced.candidates, ask.calibration, ask.loss,
        lambda *found: allocate_counts(ask, subject, traced, scored(*found)),
        lambda *found: problems_of(ask, subject, traced, scored(*found)),
        ask.recipe.seed, ask.name, ask.tell, ask.notes)


def _context(importance: Importance, subject: Subject, traced: Traced, seed: int) -> Any:
    """What importance passes see. Adapters' gradients come from the module itself."""
    if "adapter_steps" not in importance.needs:
        return subject.backend.context(traced.trace, traced.solution, seed)
    from ..live.probe import Probe

    if subject.backend is not TORCH:
        raise UsageError(f"{importance.name!r} needs a torch module",
                         fix="use a criterion without gradients")
    return Probe(subject.model, traced.trace, traced.solution, importance.needs, seed)


def _checked(importance: Importance, group: Group, context: Context) -> np.ndarray:
    value = torch.as_tensor(importance.score(group, context)).detach().double()
    if tuple(value.shape) != group.shape or not torch.isfinite(value).all():
        raise SpaError(
            f"importance pass {importance.name!r} gave no valid scores for {group.name}",
            why=f"shape {tuple(value.shape)} for {group.shape}, "
                f"finite: {bool(torch.isfinite(value).all())}",
            fix="a score is a finite tensor of shape group.shape")
    getattr(context, "done", lambda group: None)(group)
    return np.asarray(value.numpy())


class _Calibrating(Protocol):
    """A context that gathers statistics."""

    def calibrate(self, needs: Iterable[str], batches: Sequence[Batch], loss: object, *,
                  groups: Iterable[Group], tick: Callable[[], object]) -> None:
        """Gather statistics over batches, `tick` after each."""

    def widen(self, needs: Iterable[str], batches: Sequence[Batch], loss: object,
              groups: Iterable[Group]) -> None:
        """Add other batches to statistics that are there."""


def _calibrated(ask: Request, scored: Scored, context: _Calibrating) -> Iterable[Group]:
    """Yield the candidates as their statistics become complete.

    Covariances are held for one block at a time where the backend can stream them.
    """
    needs, batches = set(scored.importance.needs), ask.calibration.batches
    if not needs:
        return scored.candidates
    if _looks_again(ask, needs) and isinstance(context, Scores) \
            and context.covariance_bytes(scored.candidates) <= HELD:
        needs.add("covariance")
    if forward_only(needs) and "covariance" in needs and hasattr(context, "stream"):
        return _told(ask, len(scored.candidates), context.stream(
            needs, ask.calibration.for_repair, scored.candidates))
    context.calibrate(needs, batches, ask.loss, groups=scored.candidates, tick=_ticks(ask))
    wider = {"covariance", "curvature"} & needs
    if not getattr(scored.importance, "continued", True):
        wider -= {"curvature"}
    if ask.calibration.beside and wider:
        context.widen(wider, ask.calibration.beside, ask.loss, scored.candidates)
    return scored.candidates


def _ticks(ask: Request) -> Callable[[], None]:
    """Return what says of each batch of this process that is done how fast they go."""
    own = [*here().share(ask.calibration.batches)]
    rows = [*accumulate((amount(batch) for batch in own), initial=0)]
    integers = bool(own) and not first(own[0]).is_floating_point()
    pace, done = Pace(rows[-1], "tokens" if integers else "examples"), count(1)

    def tick() -> None:
        at = next(done)
        ask.tell(f"calibrating: {pace(rows[at])}", at, len(own))

    ask.tell("calibrating", 0, len(own))
    return tick


def _told(ask: Request, total: int, groups: Iterable[Group]) -> Iterator[Group]:
    """Say of each group whose statistics are complete how fast they go."""
    pace = Pace(total, "groups")
    ask.tell("calibrating", 0, total)
    for at, group in enumerate(groups, 1):
        ask.tell(f"calibrating: {pace(at)}", at, total)
        yield group


HELD = 1 << 30
"""Bytes of covariances that are held beside gradients, to spare the repair a pass of its own."""


def _looks_again(ask: Request, needs: set[str]) -> bool:
    """Whether the repair will ask for covariances that could be gathered beside gradients."""
    return ask.compensation is not None and not forward_only(needs) \
        and "adapter_steps" not in needs and getattr(ask.compensation, "weights", True)
