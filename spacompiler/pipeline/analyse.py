"""Trace the module (or parts of it), solve its axes, and list the groups that may shrink."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import TargetError, TraceError, UsageError
from ..evidence.losses import default_loss
from ..groups.solution import Group, Solution
from ..plan import legal
from ..request.wishes import parse_wish
from ..stages.records import Request, Subject, Traced
from ..store.room import is_large
from ..torch_backend.backend import TORCH
from ..torch_backend.gather.heads import fitting
from ..torch_backend.parts import Parts, enter, traceable
from ..torch_backend.trace import Trace
from ..torch_backend.vocabulary import check_tokens
from ..train import ahead
from .decide import is_met


def analyse(ask: Request, subject: Subject) -> tuple[Request, Subject, Traced]:
    """Trace, solve and list groups; what follows from the network (a loss, parts) is asked for.

    Raises TargetError if no group may shrink, TraceError if nothing of it can be traced.
    """
    if ask.schedule is not None and not subject.owned:  # it trains
        subject = replace(subject, model=copy.deepcopy(subject.model), owned=True)
    ask, subject, traced = trace_whole_or_parts(ask, subject)
    ask = _with_loss(ask, subject)
    if isinstance(traced.trace, Trace):
        check_tokens(traced.trace, ask.calibration.for_repair)
    _note_folded(ask, traced)
    _note_fixed(ask, subject, traced)
    traced = replace(traced, candidates=_candidates(
        ask, subject, traced, [parse_wish(t).pattern for t in ask.recipe.keep]))
    if ask.compensation is not None and ask.compensation.create_biases:
        subject, traced = _with_biases(ask, subject, traced)
    if is_met(ask, subject, traced.solution):
        return ask, subject, replace(traced, candidates=())
    if not traced.candidates:
        raise _nothing(ask, traced)
    return ask, subject, traced


def _nothing(ask: Request, traced: Traced) -> TargetError:
    """Why no group may shrink, and what would let some."""
    more = legal.openings(traced.solution, **ask.asked)
    return TargetError(
        "nothing to prune", where=ask.name, why=legal.why_none(traced.solution, **ask.asked),
        fix="see `spacompiler inspect`" + (f"; let more go with {' or '.join(more)}"
                                           if more else ""))


def trace_whole_or_parts(ask: Request, subject: Subject) -> tuple[Request, Subject, Traced]:
    """Trace and solve; what cannot be traced whole is entered by its largest parts."""
    given = ask.recipe.modules
    if given:
        ask, subject = _entered(ask, subject, given)
    try:
        traced = subject.backend.trace(subject.model, subject.inputs, is_quick(ask, subject),
                                       ask.recipe.prove)
    except TraceError as problem:
        found = () if given else traceable(subject.model, subject.inputs)
        if not found:
            raise
        ask.notes.append(f"{problem.what}: {problem.why} in {problem.where}")
        ask, subject = _entered(ask, subject, found)
        if ask.recipe.int8 or ask.recipe.decoder:
            ask.notes.append("parts have no model.onnx: --int8 and --decoder are left out")
        traced = subject.backend.trace(subject.model, subject.inputs)
    return ask, subject, _to_compute(ask, traced)


def _to_compute(ask: Request, traced: tuple[Any, Solution]) -> Traced:
    """What was traced, told where it is to be computed."""
    if isinstance(traced[0], Trace):
        traced[0].asked = ask.where
    return Traced(*traced)


def _entered(ask: Request, subject: Subject,
             paths: tuple[str, ...]) -> tuple[Request, Subject]:
    subject, calibration, notes = enter(subject, ask.calibration, paths)
    ask.notes.extend(notes)
    return replace(ask, calibration=calibration), subject


def _with_loss(ask: Request, subject: Subject) -> Request:
    """Where no loss was given, take the one that fits the network's head, once it is asked for.

    Raises UsageError if training would minimise what says nothing of what is right, or tokens
    further ahead where there are none.
    """
    if not isinstance(subject.model, nn.Module):
        return ask
    entered = isinstance(subject.model, Parts)
    whole = subject.model.whole if isinstance(subject.model, Parts) else subject.model
    data = ask.recover_data.batches if ask.recover_data else ()
    count: int = getattr(ask.recovery, "ahead", 1)
    if ask.loss is not default_loss:
        ahead.check(ask.loss, data if count > 1 else (), count)
        if entered and ask.importance.needs:
            ask.notes.append("the given loss is taken of what the parts give, in their order")
        return ask
    loss = fitting(subject.model, subject.inputs, parts_only=entered)
    own = fitting(whole, subject.whole_inputs if entered else subject.inputs)
    ahead.check(own, data if count > 1 else (), count)
    if getattr(ask.recovery, "task", 0) and not own.teaches(data):
        raise UsageError("there is nothing to train on: the results have no labels",
                         where=ask.name, why=f"its loss would be {own.head.facts((), {})['name']}",
                         fix="give batches with labels, a loss, or distil alone: "
                             f"{ask.recovery.name}(task=0, blocks=1)")
    return replace(ask, loss=loss)


def _note_folded(ask: Request, traced: Traced) -> None:
    """Say which arrays were replaced by what follows from them."""
    folded = getattr(traced.trace, "folded", ())
    if folded:
        ask.notes.append(f"{len(folded)} arrays are read through statistics of themselves alone "
                         f"({folded[0]}, ...): what follows from them was computed once")


def _note_fixed(ask: Request, subject: Subject, traced: Traced) -> None:
    """Say that what is written as a program serves the example's batch alone."""
    if subject.backend is not TORCH or is_quick(ask, subject):
        return
    fixed: list[tuple[str, int]] = traced.trace.fixed()
    if fixed:
        sizes = ", ".join(f"{size} of {name}" for name, size in fixed[:4])
        ask.notes.append(f"the module's code fixes the first dimension of its inputs ({sizes}): "
                         "its traced program and model.onnx serve no other batch")
    if single := traced.trace.single():
        ask.notes.append(f"the example inputs are a single example ({', '.join(single[:4])}), and "
                         "a size of one is traced as fixed: the traced program and model.onnx "
                         "serve one example at a time; give two or more for a free batch")


def is_quick(ask: Request, subject: Subject) -> bool:
    """True if the compile looks at weights alone, and runs on the example inputs at most.

    Where it is proved this is for large models alone: what is exported serves other calls, and
    layouts that write the program, too.
    """
    recipe = ask.recipe
    runs = recipe.onnx or recipe.decoder or recipe.keep_adapter or "latency" in recipe.target \
        or bool(ask.importance.needs) or recipe.modules
    exported = (recipe.prove or recipe.latency) and not is_large(subject.model)
    return not (runs or exported or ask.compensation or ask.recovery or ask.schedule)


def _with_biases(ask: Request, subject: Subject, traced: Traced) -> tuple[Subject, Traced]:
    """Put zero biases where consumers lack one, and trace again if any was missing."""
    model = subject.backend.add_biases(subject.model, traced, subject.owned)
    if model is None:
        return subject, traced
    subject = replace(subject, biased=True, model=model)
    again = _to_compute(ask, subject.backend.trace(subject.model, subject.inputs))
    return subject, replace(again, candidates=_candidates(ask, subject, again))


def _candidates(ask: Request, subject: Subject, traced: Traced,
                wished: Sequence[str] = ()) -> tuple[Group, ...]:
    """Groups that may shrink; ranks of layers that are products have a budget of their own."""
    held = subject.factored.held if subject.factored else frozenset()
    return tuple(g for g in legal.candidates(traced.solution, **ask.asked, wished=wished)
                 if g.name not in held)
