"""From a plan to a model: weights are repaired, the plan is proved, the model is made and trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import ControlError
from ..repair.repairer import repair as repaired
from ..stages.proof import Proof
from ..stages.records import Decided, Emitted, Request, Scored, Subject
from ..stages.tolerances import CONTROL
from ..system.process import warn_user
from ..torch_backend.emit.unsaved import NOT_STOCK, refusing
from ..torch_backend.kinds import is_hf
from ..torch_backend.own_layers import OwnSizes, loads
from . import keep
from .decide import statistics_of
from .quality import judge


def repair(ask: Request, subject: Subject, scored: Scored, decided: Decided) -> Decided:
    """Let the compensation pass repair what stays, in the network as it was read.

    Where that changes nothing, the report says so.
    """
    why = "no width changed"
    if decided.choices:
        context = statistics_of(ask, subject, decided, scored)
        ask.notes.extend(keep.repaired(ask, context.network, lambda network: repaired(
            network, decided.solution, decided.choices, ask.compensation, context,
            ask.calibration.for_repair, must=ask.must_repair)))
        why = "" if decided.trace.repaired else "no stored weights read what the plan removes"
    if why:
        ask.notes.append(f"{ask.compensation.name} repaired nothing: {why}")
    return replace(decided, idle=bool(why))


def prove(ask: Request, subject: Subject, decided: Decided) -> Proof | None:
    """Prove the plan in float64 before anything is emitted.

    Raises ControlError if a wrong index goes unnoticed.
    """
    if not ask.recipe.prove:
        ask.notes.append("the proof was skipped on request")
        return None
    if not decided.choices and subject.reduced:
        ask.notes.append("no width changed: that the blocks are gone or layers are products, and "
                         "nothing else, is the proof")
        return None
    proof: Proof = keep.proof(ask, lambda: subject.backend.prove(
        subject.model, decided, ask.recipe.seed))
    if not proof.holds:
        raise ControlError(
            "the proof's negative control was not caught",
            why=f"a wrong index in {proof.swapped} changes results by {proof.control:.1e} only "
                f"(needed {CONTROL.value:.0e}; error {proof.error:.1e}, "
                f"allowed {proof.tolerance:.0e})",
            fix=f"pass example inputs that reach that layer, or leave it whole: --ignore "
                f"{proof.swapped}")
    if proof.redrawn:
        ask.notes.append("no single index matters to the results of these weights and inputs (tiny "
                         "or zero branches, dead units): the negative control is of weights drawn "
                         "anew, on which the plan is proved too")
    if proof.approximate is not None:
        ask.notes.append(
            "statistics of norms are taken over fewer slices: results differ from the masked "
            f"dense model by {proof.approximate:.1e} (the wiring is proved)")
    return proof


def emit(ask: Request, subject: Subject, decided: Decided) -> Emitted:
    """Make the pruned model in memory."""
    made: Emitted = subject.backend.emit(subject, decided, ask.recipe.layout, ask.notes)
    if isinstance(made.model, OwnSizes):
        ask.notes.append(loads(type(made.model)))
    if made.layout == "any":
        refusing(made.model)
        if ask.recipe.layout == "auto" and is_hf(made.subject.reference):
            ask.notes.append(NOT_STOCK)
            warn_user(NOT_STOCK)
    return made


def set_apart(emitted: Emitted) -> Emitted:
    """Give the pruned model arrays of its own where it shares some with what the user gave."""
    from ..torch_backend.emit.apart import set_apart, tensors

    def constants() -> Iterator[torch.Tensor]:
        held = emitted.decided.trace.program.constants.values()
        return (t for t in held if isinstance(t, torch.Tensor))

    set_apart(emitted.model, [*tensors(emitted.subject.given), *constants()])
    return emitted


def compare(ask: Request, emitted: Emitted) -> Emitted:
    """Note how dense and pruned compare on data; the result is whole without it."""
    try:
        return replace(emitted, quality=judge(ask, emitted))
    except Exception as problem:  # any code may run here
        ask.notes.append("dense and pruned could not be compared: "
                         f"{type(problem).__name__}: {problem}".splitlines()[0])
        return emitted
