"""Before anything is traced: adapters are merged, calibration text is continued."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from ..errors import SpaError, UsageError
from ..request.needs import check_exported
from ..request.options import known
from ..stages.records import Request, Subject
from ..torch_backend.backend import TORCH
from ..torch_backend.weights import weights_hash
from . import recover


def merge_adapters(ask: Request, subject: Subject) -> Subject:
    """Merge the recipe's adapters, or those of a PeftModel, into the module."""
    from ..adapters import merging

    if ask.recovery is not None:
        recover.check(ask, subject)
    if subject.backend is not TORCH and ask.recipe.adapters:
        raise SpaError("adapters need a torch module", where=ask.name,
                       fix="merge them before exporting to ONNX, or give the module itself")
    if ask.recipe.keep_adapter:
        from ..adapters import keeping

        keeping.check(ask)
        subject = replace(subject, base_hash=weights_hash(subject.model))
    if merging.is_adapted(subject.model):
        model, notes = merging.merge_adapted(subject.model, subject.inputs)
        subject = replace(subject, model=model)
        ask.notes.extend(notes)
    if isinstance(subject.model, nn.Module):
        subject = replace(subject, arrays=frozenset(subject.model.state_dict()))
    return _merged(ask, subject) if ask.recipe.adapters else subject


def _merged(ask: Request, subject: Subject) -> Subject:
    from ..adapters import files, foreign, merging

    adapters = [foreign.read(*files.parse(text)) for text in ask.recipe.adapters]
    ask.notes.extend(files.other_names(adapters, ask.name))
    module = subject.model if subject.owned else copy.deepcopy(subject.model)
    for n, adapter in enumerate(adapters):
        adapters[n], notes = foreign.resolved(adapter, module)
        ask.notes.extend(notes)
    base: dict[str, torch.Tensor] | None = {} if ask.recipe.keep_adapter else None
    model, notes = merging.merge(module, adapters, subject.inputs, combine=ask.recipe.combine,
                                 base=base)
    ask.notes.extend(notes)
    return replace(subject, model=model, adapters=tuple(adapters), base=base or {})


def check_weights(ask: Request, subject: Subject) -> Subject:
    """Raise SpaError if a weight is not finite; a file takes example inputs from calibration.

    Raises UsageError for options that act on torch modules alone.
    """
    if subject.backend.kind == "onnx":
        check_exported(vars(ask.recipe), {e.name: e.default for e in known(type(ask.recipe))})
        first = next(iter(ask.calibration.batches), ((), {}))
        if not subject.inputs and any(first):
            subject = replace(subject, inputs=first[1] or first[0])
        if ask.recovery is not None or ask.schedule is not None:
            raise UsageError(
                "an ONNX file cannot be trained", why="ONNX Runtime computes forward only",
                fix="leave out recovery, or train the torch model and export it")
        ask.notes.extend(subject.model.notes)
    if not subject.sound or subject.adapters:
        subject.backend.check(subject.model, ask.name)
    return subject


def write_on(ask: Request, subject: Subject) -> Request:
    """Let the dense model continue the calibration's windows, for the repair.

    Raises UsageError if nothing is repaired, or the model writes no text.
    """
    from ..torch_backend.gather.sampling import continued

    if ask.compensation is None:
        raise UsageError("continued text is for the repair, and nothing is repaired",
                         fix="give --repair refit, or leave --continued out")
    given = ask.calibration
    written = continued(subject.model, given.batches, ask.recipe.seed)
    return replace(ask, calibration=replace(
        given, origin=f"{given.origin}, continued by the model itself",
        beside=[*given.beside, *written]))
