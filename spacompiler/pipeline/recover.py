"""The recovery step: give a recovery pass the pruned module, the dense one and data."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SpaError, UsageError
from ..evidence.calls import Batch
from ..store.said import said
from ..torch_backend.gather.heads import Fitting, fitting
from ..train.loop import Training

if TYPE_CHECKING:
    from ..stages.records import Job

HELD_OUT = 16  # one batch of so many is held out


def check(job: Job) -> None:
    """Refuse, before anything is computed, what cannot be trained or trained on."""
    from ..torch_backend.backend import TORCH

    if job.backend is not TORCH:
        raise SpaError("recovery needs a torch module", where=job.name,
                       fix="train before exporting to ONNX, or give the module itself")
    by_blocks: float = getattr(job.recovery, "blocks", 0.0)
    if by_blocks and job.recipe.blocks:
        raise UsageError("blocks cannot be distilled one by one where some are dropped",
                         why="those that stay have other numbers than in the dense network",
                         fix="set blocks=0; logits=1 distils from the whole dense network")
    if job.recover_data is None or len(job.recover_data.batches) < 2:
        raise UsageError("there is too little data to recover on",
                         why=f"{_origin(job) or 'no data'}, of which some is held out",
                         fix="give more with --recover-data or --recover-samples")


def recover(job: Job) -> None:
    """Train the pruned module; the dense one stays as it is.

    The proof is of the plan, before training; the reload and ONNX are checked after it.

    Raises SpaError if there is too little data or nothing to train.
    """
    calls = _calls(job)
    held_out = max(1, len(calls) // HELD_OUT)
    loss = job.loss
    if isinstance(loss, Fitting) and loss.parts_only:
        loss = fitting(job.module, (job.trace.args, job.trace.kwargs))
    task = Training(job.pruned, job.reference, calls[:-held_out], calls[-held_out:], loss,
                    job.recipe.seed, job.progress, job.checkpoint, _key(job, calls))
    flags = {name: p.requires_grad for name, p in job.pruned.named_parameters()}
    job.trained = {"pass": said(job.recovery), "data": _origin(job), **job.recovery.run(task)}
    for name, p in job.pruned.eval().named_parameters():
        p.requires_grad_(flags.get(name, p.is_floating_point()))
    if job.emission == "module":
        job.program = None  # it is made again, with what was trained
    else:
        held, body = job.program.state_dict, job.pruned.body
        trained = {**dict(body.named_parameters(remove_duplicate=False)),
                   **dict(body.named_buffers(remove_duplicate=False))}
        held.update({name: trained[name] for name in held.keys() & trained.keys()})


def _calls(job: Job) -> list[Batch]:
    """The training data as calls, with the constants of the example inputs filled in."""
    constants = {k: v for k, v in job.trace.kwargs.items() if not isinstance(v, torch.Tensor)}
    found = job.recover_data.batches if job.recover_data else ()
    return [(args, {**constants, **kwargs}) for args, kwargs in found]


def _origin(job: Job) -> str:
    return job.recover_data.origin if job.recover_data else ""


def _key(job: Job, calls: list[Batch]) -> str:
    """What must be equal for a checkpoint to be continued."""
    shapes: Any = [tuple(x.shape) for args, kwargs in calls for x in (*args, *kwargs.values())
                   if isinstance(x, torch.Tensor)]
    facts = (job.recovery, job.plan.weights_hash, job.plan.kept, job.recipe.seed, _origin(job),
             shapes)
    return hashlib.sha256(said(facts).encode()).hexdigest()
