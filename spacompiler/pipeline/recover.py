"""The recovery step: give a recovery pass the pruned module, the dense one and data."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from ..errors import SpaError, UsageError
from ..evidence.calls import Batch, as_call
from ..evidence.labels import inputs_only, unbound
from ..evidence.losses import default_loss
from ..evidence.where import HERE
from ..stages.records import Emitted, Request, Subject
from ..store.said import said
from ..system.group import Team
from ..torch_backend.gather.heads import Fitting, fitting
from ..torch_backend.trace import Trace
from ..torch_backend.weights import weights_hash
from ..train import eight_bits
from ..train.loop import Training
from ..train.options import Schedule as Options
from ..train.shared import changing
from ..train.there import there
from . import keep
from .resolved import digest_of

HELD_OUT = 16  # one batch of so many is held out


def check(ask: Request, subject: Subject) -> None:
    """Refuse, before anything is computed, what cannot be trained or trained on."""
    from ..torch_backend.backend import TORCH

    if subject.backend is not TORCH:
        raise SpaError("recovery needs a torch module", where=ask.name,
                       fix="train before exporting to ONNX, or give the module itself")
    if getattr(ask.recovery, "bits", 0):
        eight_bits.library()
    by_blocks: float = getattr(ask.recovery, "blocks", 0.0)
    if by_blocks and ask.recipe.blocks:
        raise UsageError("blocks cannot be distilled one by one where some are dropped",
                         why="those that stay have other numbers than in the dense network",
                         fix="set blocks=0; logits=1 distils from the whole dense network")
    if ask.recover_data is None or len(ask.recover_data.batches) < 2:
        raise UsageError("there is too little data to recover on",
                         why=f"{_origin(ask) or 'no data'}, of which some is held out",
                         fix="give more with --recover-data or --recover-samples")
    for i, batch in enumerate(ask.recover_data.batches):
        _check_call(subject, i, *batch)


def _check_call(subject: Subject, number: int, args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> None:
    """Raise SpaError for a batch of training data that is no call of the network."""
    example = as_call(() if subject.inputs is None else subject.inputs)
    constants = {k: v for k, v in example[1].items() if not isinstance(v, torch.Tensor)}
    named = inputs_only(subject.model, kwargs)
    why = unbound(subject.model, args, {**constants, **named})
    known = {k for k, v in example[1].items() if isinstance(v, torch.Tensor)}
    if not why and known and not args and not known & named.keys():
        why = f"it has {', '.join(named) or 'nothing'}, and the example inputs {', '.join(known)}"
    if why:
        raise SpaError("training data do not fit the network", where=f"batch {number}", why=why,
                       fix="give the same arguments as the example inputs, labels as `labels`")


def alone(ask: Request) -> str:
    """Say why several processes cannot share a training, as far as the request says, or ""."""
    if not getattr(ask.recovery, "shares", False):
        return f"{ask.recovery.name} does not say that its steps can be (shares = True)"
    if getattr(ask.recovery, "accumulate", 1) < 2:
        return "a step has one batch, and a batch is not split; accumulate=N deals out N of them"
    return ""


def recover(ask: Request, emitted: Emitted, team: Team, *, helps: bool = False) -> Emitted:
    """Train the pruned module, with others where they can share it; the dense one stays as it is.

    The proof is of the plan, before training; the reload and ONNX are checked after it. A process
    that `helps` where nothing can be shared does nothing.

    Raises SpaError if there is too little data or nothing to train.
    """
    model, calls = emitted.model, _calls(ask, emitted.decided.trace)
    why = _alone(ask, emitted, calls[0]) if team.size > 1 else ""
    if why:
        ask.notes.append("nothing of the training was shared out over the processes of this run: "
                         + why)
        if helps:
            return emitted
    task = _task(ask, emitted, ask.where.of(calls), team)
    if why:
        task.team = Team()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    distils = _distils(ask.recovery, task)
    with there(emitted.subject.reference, ask.where if distils else HERE), \
            there(model, ask.where, trained=True):
        found = ask.recovery.run(task)
    trained = {"pass": said(ask.recovery), "data": _origin(ask), **found}
    for name, p in model.eval().named_parameters():
        p.requires_grad_(flags.get(name, p.is_floating_point()))
    if emitted.emission == "program":
        held, body = emitted.program.state_dict, model.body
        arrays = {**dict(body.named_parameters(remove_duplicate=False)),
                  **dict(body.named_buffers(remove_duplicate=False))}
        held.update({name: arrays[name] for name in held.keys() & arrays.keys()})
    return replace(emitted, trained=trained)


def _task(ask: Request, emitted: Emitted, calls: list[Batch], team: Team) -> Training:
    """What the recovery works on; the first process alone keeps a checkpoint."""
    trace, loss, held_out = emitted.decided.trace, ask.loss, max(1, len(calls) // HELD_OUT)
    if isinstance(loss, Fitting) and loss.parts_only:
        loss = fitting(emitted.subject.model, (trace.args, trace.kwargs))
    return Training(emitted.model, emitted.subject.reference, calls[:-held_out], calls[-held_out:],
                    loss, ask.recipe.seed, ask.tell, ask.checkpoint if team.first else None,
                    _key(ask, emitted, calls),
                    ask.notes.append if ask.checkpoint == keep.training(ask) else None, team)


def _alone(ask: Request, emitted: Emitted, batch: Batch) -> str:
    """Say why several processes cannot share the training of a model, or ""."""
    why = alone(ask)
    if not why and (names := changing(emitted.model, batch)):
        why = f"{names[0]} follows from one batch after the other ({len(names)} arrays do)"
    return why


def _distils(recovery: object, task: Training) -> bool:
    """Whether the dense network is run beside the pruned one."""
    asked = any(getattr(recovery, name, 0) for name in ("logits", "blocks"))
    return asked or (isinstance(recovery, Options) and bool(
        recovery.divergence(task.loss, task.dense)))


def _calls(ask: Request, trace: Trace) -> list[Batch]:
    """The training data as calls, with the constants of the example inputs filled in."""
    constants = {k: v for k, v in trace.kwargs.items() if not isinstance(v, torch.Tensor)}
    found = ask.recover_data.batches if ask.recover_data else ()
    return [(args, {**constants, **kwargs}) for args, kwargs in found]


def _origin(ask: Request) -> str:
    return ask.recover_data.origin if ask.recover_data else ""


def _own(loss: object) -> tuple[str, ...]:
    """What tells a loss of the user's from others; nothing where the compiler found it."""
    if loss is default_loss or isinstance(loss, Fitting):
        return ()
    code = getattr(loss, "__code__", None)
    return said(loss), "" if code is None else said((code.co_code, code.co_names, code.co_consts))


def _key(ask: Request, emitted: Emitted, calls: list[Batch]) -> str:
    """What must be equal for a checkpoint to be continued."""
    shapes: Any = [tuple(x.shape) for args, kwargs in calls for x in (*args, *kwargs.values())
                   if isinstance(x, torch.Tensor)]
    plan = emitted.decided.plan
    facts = (ask.recovery, plan.weights_hash, plan.kept, ask.recipe.seed, _origin(ask), shapes,
             *_own(ask.loss),
             *((digest_of(ask.recover_data), weights_hash(emitted.model))
               if ask.checkpoint and ask.recover_data else ()))
    return hashlib.sha256(said(facts).encode()).hexdigest()
