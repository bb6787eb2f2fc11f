"""How good the result is: dense and pruned on data that nothing else looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, isfinite
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..evidence.calls import Batch
from ..evidence.labels import inputs_only
from ..evidence.losses import default_loss, distance, first_floating, is_value
from ..stages.records import Emitted, Request
from ..system.staging import Scratch
from ..torch_backend.gather.heads import OWN, Fitting, fitting
from ..torch_backend.weights import called
from ..train.there import there

Loss = Callable[..., torch.Tensor]

DOUBLED = 2.0
"""Times its perplexity (or e to its loss) beyond which a result is said to be poor."""
HELPS = ("let more stay; --importance curvature --allocation measured; --repair refit with more "
         "--samples; --recover lora")


def judge(ask: Request, emitted: Emitted) -> dict[str, Any]:
    """Return loss, agreement and divergence of dense and pruned, and warn where much was lost.

    `agreement` is the share of positions with the same likeliest answer, `divergence` the mean KL
    divergence (or half a squared error) from the dense network. Held-out batches where there are
    some, else the last one that was calibrated on, and `data` says so.
    """
    with Scratch() as folder:
        return _judged(ask, emitted, *(emitted.subject.backend.module(model, folder) for model in (
            emitted.subject.reference, emitted.model)))


def _judged(ask: Request, emitted: Emitted, dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    batches, data = _data(ask)
    call = (emitted.decided.trace.args, emitted.decided.trace.kwargs)
    loss = ask.loss
    if loss is default_loss:  # a file: its head is looked for among what it computes
        loss = fitting(dense, call)
    elif isinstance(loss, Fitting):
        loss = fitting(dense, call) if loss.parts_only else Fitting(loss.module, loss.call)
    with there(dense, ask.where), there(pruned, ask.where):
        found = [_compared(dense, pruned, loss, ask.where.of(batch if any(batch) else call))
                 for batch in batches]
    mean = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
    return {"data": data, "agreement": mean["agreement"], "divergence": mean["divergence"],
            **_losses(ask, loss, mean)}


def _data(ask: Request) -> tuple[Sequence[Batch], str]:
    given = ask.calibration
    if given.held_out:
        return given.held_out, f"held out of {given.origin}"
    return given.batches[-1:], f"the last batch of {given.origin}, which was calibrated on"


def _losses(ask: Request, loss: Loss, mean: dict[str, float]) -> dict[str, Any]:
    """The losses, where there are labels to speak of, and a note where much was lost."""
    dense, pruned = mean["dense"], mean["pruned"]
    poor = mean["agreement"] < 1 / DOUBLED
    said = f"{mean['agreement']:.1%} of the likeliest answers are the dense network's"
    told: dict[str, Any] = {}
    if not isinstance(loss, Fitting) or OWN not in (loss.facts() or {}).get("labels", OWN):
        told = {"loss": {"dense": dense, "pruned": pruned}}
        poor = not pruned - dense <= _log(DOUBLED)
        said = f"the loss went from {dense:.3f} to {pruned:.3f}"
        if isinstance(loss, Fitting) and "token" in (loss.facts() or {}).get("name", ""):
            told["perplexity"] = {"dense": _exp(dense), "pruned": _exp(pruned)}
            said = f"perplexity went from {_exp(dense):.4g} to {_exp(pruned):.4g}"
    if poor:
        ask.notes.append(f"much was lost: {said}; what would help: {HELPS}")
    return told


def _log(times: float) -> float:
    return float(torch.tensor(times).log())


def _exp(loss: float) -> float:
    return exp(loss) if isfinite(loss) and loss < 700 else float("inf")


def _compared(dense: nn.Module, pruned: nn.Module, loss: Loss, batch: Batch) -> dict[str, float]:
    args, kwargs = batch
    given = inputs_only(dense, kwargs)
    want, got = (pytree.tree_leaves(called(m, args, given)) for m in (dense, pruned))
    a, b = first_floating(want).float(), first_floating(got).float()
    dim = 1 if a.ndim == 4 else -1
    same = torch.isclose(a, b, rtol=0.1, atol=0.0).float().mean() if is_value(a) else \
        (a.argmax(dim) == b.argmax(dim)).float().mean()
    with torch.no_grad():
        losses = {name: float(loss(found, args, kwargs)) for name, found in
                  (("dense", want), ("pruned", got))}
        return {"agreement": float(same), "divergence": float(distance(b, a)), **losses}
