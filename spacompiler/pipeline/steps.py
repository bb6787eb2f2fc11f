"""The pipeline, as one list: trace, solve, score, allocate, plan, prove, emit, check, write.

Each step is a function of the job so far; between any two of them the job can be looked at.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import ControlError, SpaError, TargetError, TraceError, UsageError
from ..evidence.losses import default_loss
from ..evidence.statistics import forward_only
from ..groups.solution import Group
from ..plan import legal as allocation
from ..repair.repairer import repair
from ..stages.proof import CONTROL
from ..stages.records import Job
from ..torch_backend.backend import TORCH
from ..torch_backend.emit.unsaved import NOT_STOCK, refusing
from ..torch_backend.gather.heads import fitting
from ..torch_backend.kinds import is_hf
from ..torch_backend.trace import Trace
from ..torch_backend.vocabulary import check_tokens
from ..torch_backend.weights import weights_hash
from . import defaults
from .decide import allocate_counts, is_met, statistics_of


def merge_adapters(job: Job) -> None:
    """Merge the recipe's adapters, or those of a PeftModel, into the module before analysis."""
    from ..adapters import files, foreign, keeping, merging
    from . import recover as recovery

    if job.recovery is not None:
        recovery.check(job)
    if job.backend is not TORCH and job.recipe.adapters:
        raise SpaError("adapters need a torch module", where=job.name,
                       fix="merge them before exporting to ONNX, or give the module itself")
    if job.recipe.keep_adapter:
        keeping.check(job)
        job.base_hash = weights_hash(job.module)
    if merging.is_adapted(job.module):
        job.module, notes = merging.merge_adapted(job.module, job.inputs)
        job.notes.extend(notes)
    if isinstance(job.module, nn.Module):
        job.arrays = frozenset(job.module.state_dict())
    if job.recipe.adapters:
        adapters = [foreign.read(*files.parse(text)) for text in job.recipe.adapters]
        job.notes.extend(files.other_names(adapters, job.name))
        module = job.module if job.owned else copy.deepcopy(job.module)
        for n, adapter in enumerate(adapters):
            adapters[n], notes = foreign.resolved(adapter, module)
            job.notes.extend(notes)
        job.adapters = tuple(adapters)
        job.module, notes = merging.merge(module, adapters, job.inputs,
                                          combine=job.recipe.combine,
                                          base=job.base if job.recipe.keep_adapter else None)
        job.notes.extend(notes)


def check_weights(job: Job) -> None:
    """Raise SpaError if a weight is not finite."""
    job.backend.check_weights(job)


def write_on(job: Job) -> None:
    """Let the dense model continue the calibration's windows, for the repair.

    Raises UsageError if nothing is repaired, or the model writes no text.
    """
    from ..torch_backend.gather.sampling import continued

    if job.compensation is None:
        raise UsageError("continued text is for the repair, and nothing is repaired",
                         fix="give --repair refit, or leave --continued out")
    given = job.calibration
    beside = continued(job.module, given.batches, job.recipe.seed)
    job.calibration = replace(given, origin=f"{given.origin}, continued by the model itself",
                              beside=beside)


def analyse(job: Job) -> None:
    """Trace the module (or parts of it), solve its axes, and list the groups that may shrink."""
    if job.schedule is not None and not job.owned:  # it trains
        job.module, job.owned = copy.deepcopy(job.module), True
    trace_whole_or_parts(job)
    _find_loss(job)
    if isinstance(job.trace, Trace):
        check_tokens(job.trace, job.calibration.for_repair)
    _note_folded(job)
    _note_fixed(job)
    job.candidates = _candidates(job)
    if job.compensation is not None and job.compensation.create_biases:
        _add_biases(job)
    if is_met(job):
        job.candidates = []
        return
    if not job.candidates:
        more = allocation.openings(job.solution, **_asked(job))
        raise TargetError(
            "nothing to prune", where=job.name, why=allocation.why_none(
                job.solution, **_asked(job)),
            fix="see `spacompiler inspect`" + (f"; let more go with {' or '.join(more)}"
                                               if more else ""))


def trace_whole_or_parts(job: Job) -> None:
    """Set `trace` and `solution`; what cannot be traced whole is entered by its largest parts."""
    from ..torch_backend import parts

    if job.recipe.modules:
        parts.enter(job, job.recipe.modules)
    try:
        job.trace, job.solution = job.backend.trace(job.module, job.inputs, _is_quick(job))
    except TraceError as problem:
        found = () if job.recipe.modules else parts.traceable(job.module, job.inputs)
        if not found:
            raise
        job.notes.append(f"{problem.what}: {problem.why} in {problem.where}")
        parts.enter(job, found)
        job.trace, job.solution = job.backend.trace(job.module, job.inputs)


def _find_loss(job: Job) -> None:
    """Where no loss was given, take the one that fits the network's head, once it is asked for.

    Raises UsageError if training would minimise what says nothing of what is right.
    """
    from ..torch_backend.parts import Parts

    if not isinstance(job.module, nn.Module):
        return
    entered = isinstance(job.module, Parts)
    whole = job.module.whole if isinstance(job.module, Parts) else job.module
    if job.loss is not default_loss:
        if entered and job.importance.needs:
            job.notes.append("the given loss is taken of what the parts give, in their order")
        return
    job.loss = fitting(job.module, job.inputs, parts_only=entered)
    own = fitting(whole, job.whole_inputs if entered else job.inputs)
    data = job.recover_data.batches if job.recover_data else ()
    if getattr(job.recovery, "task", 0) and not own.teaches(data):
        raise UsageError("there is nothing to train on: the results have no labels",
                         where=job.name, why=f"its loss would be {own.head.facts((), {})['name']}",
                         fix="give batches with labels, a loss, or distil alone: "
                             f"{job.recovery.name}(task=0, blocks=1)")


def _note_folded(job: Job) -> None:
    """Say which arrays were replaced by what follows from them."""
    folded = getattr(job.trace, "folded", ())
    if folded:
        job.notes.append(f"{len(folded)} arrays are read through statistics of themselves alone "
                         f"({folded[0]}, ...): what follows from them was computed once")


def _note_fixed(job: Job) -> None:
    """Say that what is written as a program serves the example's batch alone."""
    whole = job.backend is TORCH and not _is_quick(job)
    fixed: list[tuple[str, int]] = job.trace.fixed() if whole else []
    if fixed:
        sizes = ", ".join(f"{size} of {name}" for name, size in fixed[:4])
        job.notes.append(f"the module's code fixes the first dimension of its inputs ({sizes}): "
                         "its traced program and model.onnx serve no other batch")
    if whole and (single := job.trace.single()):
        job.notes.append(f"the example inputs are a single example ({', '.join(single[:4])}), and "
                         "a size of one is traced as fixed: the traced program and model.onnx "
                         "serve one example at a time; give two or more for a free batch")


def _is_quick(job: Job) -> bool:
    """True if the compile looks at weights alone, and needs no program of the network."""
    recipe = job.recipe
    runs = recipe.prove or recipe.onnx or recipe.latency or recipe.keep_adapter \
        or bool(job.importance.needs) or recipe.modules
    return not (runs or job.compensation or job.recovery or job.schedule)


def _candidates(job: Job) -> list[Group]:
    return allocation.candidates(job.solution, **_asked(job))


def _asked(job: Job) -> dict[str, Any]:
    """What the recipe says of groups that may go."""
    r = job.recipe
    return {"roles": r.roles, "only": r.only, "ignore": r.ignore, "approximate": r.approximate}


def _add_biases(job: Job) -> None:
    """Put zero biases where consumers lack one, and trace again if any was missing."""
    if not job.backend.add_biases(job):
        return
    job.biased = True
    job.trace, job.solution = job.backend.trace(job.module, job.inputs)
    job.candidates = _candidates(job)


def score(job: Job) -> None:
    """Run calibration if the importance pass needs it, then score every candidate.

    A schedule trains instead, and leaves scores and counts.
    """
    if not job.candidates:
        return
    if job.schedule is not None:
        job.schedule.run(job, lambda: allocate_counts(job))
        return
    defaults.settle_importance(job)
    context = _context(job)
    try:
        _score(job, context)
    finally:
        getattr(context, "close", lambda: None)()


def _context(job: Job) -> Any:
    """What importance passes see; it is kept for what it still holds.

    Adapters' gradients come from the module itself, and nothing is left of them.
    """
    if "adapter_steps" not in job.importance.needs:
        job.context = job.backend.context(job)
        return job.context
    from ..live.probe import Probe

    if job.backend is not TORCH:
        raise UsageError(f"{job.importance.name!r} needs a torch module",
                         fix="use a criterion without gradients")
    return Probe(job.module, job.trace, job.solution, job.importance.needs, job.recipe.seed)


def _score(job: Job, context: Any) -> None:
    for group in _calibrated(job, context):
        value = torch.as_tensor(job.importance.score(group, context)).detach().double()
        if tuple(value.shape) != group.shape or not torch.isfinite(value).all():
            raise SpaError(
                f"importance pass {job.importance.name!r} gave no valid scores for {group.name}",
                why=f"shape {tuple(value.shape)} for {group.shape}, "
                    f"finite: {bool(torch.isfinite(value).all())}",
                fix="a score is a finite tensor of shape group.shape")
        job.scores[group.name] = value.numpy()


def _calibrated(job: Job, context: Any) -> Iterable[Group]:
    """Yield the candidates as their statistics become complete.

    Covariances are held for one block at a time where the backend can stream them.
    """
    needs, batches = job.importance.needs, job.calibration.batches
    total = len(batches)
    done = iter(range(1, total + 1))
    if not needs:
        return job.candidates
    if forward_only(needs) and "covariance" in needs and hasattr(context, "stream"):
        job.progress("calibrating", 0, total)
        return context.stream(needs, job.calibration.for_repair, job.candidates)
    context.calibrate(needs, batches, job.loss, groups=job.candidates,
                      tick=lambda: job.progress("calibrating", next(done), total))
    wider = {"covariance", "curvature"} & set(needs)
    if not getattr(job.importance, "continued", True):
        wider -= {"curvature"}
    if job.calibration.beside and wider:
        context.widen(wider, job.calibration.beside, job.loss, job.candidates)
    return job.candidates


def mend(job: Job) -> None:
    """Let the compensation pass repair what stays, in the network as it was read.

    Where that changes nothing, the report says so.
    """
    why = "no width changed"
    if job.choices:
        context = statistics_of(job)
        job.notes.extend(repair(context.network, job.solution, job.choices, job.compensation,
                                context, job.calibration.for_repair, must=job.must_repair))
        job.context = None
        why = "" if job.trace.repaired else "no stored weights read what the plan removes"
    if why:
        job.idle = True
        job.notes.append(f"{job.compensation.name} repaired nothing: {why}")


def prove_plan(job: Job) -> None:
    """Prove the plan in float64 before anything is emitted."""
    if not job.recipe.prove:
        job.notes.append("the proof was skipped on request")
        return
    if not job.choices and job.dropped is not None:
        job.notes.append("no width changed: that the blocks are gone, and nothing else, is the "
                         "proof")
        return
    job.proof = job.backend.prove(job)
    if not job.proof.holds:
        raise ControlError(
            "the proof's negative control was not caught",
            why=f"a wrong index in {job.proof.swapped} changes results by "
                f"{job.proof.control:.1e} only (needed {CONTROL:.0e}; error {job.proof.error:.1e}, "
                f"allowed {job.proof.tolerance:.0e})",
            fix="the example inputs may not reach that layer; pass other ones")
    if job.proof.approximate is not None:
        job.notes.append(
            "statistics of norms are taken over fewer slices: results differ from the masked "
            f"dense model by {job.proof.approximate:.1e} (the wiring is proved)")


def emit(job: Job) -> None:
    """Make the pruned model in memory."""
    job.backend.emit(job)
    if job.layout == "any":
        refusing(job.pruned)
        if job.recipe.layout == "auto" and is_hf(job.reference):
            job.notes.append(NOT_STOCK)
            warnings.warn(NOT_STOCK, stacklevel=2)


def set_apart(job: Job) -> None:
    """Give the pruned model arrays of its own where it shares some with what the user gave."""
    from ..torch_backend.emit.apart import set_apart, tensors

    constants = [t for t in job.trace.program.constants.values() if isinstance(t, torch.Tensor)]
    set_apart(job.pruned, [*tensors(job.given), *constants])


def keep_adapter(job: Job) -> None:
    """Take a kept adapter out of the pruned model again, cut to its size."""
    from ..adapters import keeping

    keeping.keep(job)


def recover(job: Job) -> None:
    """Train the pruned module."""
    from . import recover as recovery

    recovery.recover(job)


