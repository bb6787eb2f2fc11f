"""Cross-entropy over large vocabularies without copies of the logits.

torch's function holds the log-probabilities beside the logits, and the gradient goes through one
more array of that size for each slice and reshape on the way. This one works through the rows a few
at a time: forward keeps one number a row, backward makes the gradient and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.nn import functional

from ..errors import SpaError
from .reused import again
from .where import able

IGNORED = -100
CHUNK = 1 << 19  # elements that are worked on at a time: they stay in the cache


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of -log softmax(logits)[target]: logits (..., classes).

    Rows whose target is negative do not count. The result can be differentiated twice.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    return _CrossEntropy.apply(flat, targets.reshape(-1))  # type: ignore[no-any-return]


def next_token(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of each position with the next one: (b, n, v), (b, n)."""
    return cross_entropy(logits, later(ids, 1))


def later(ids: torch.Tensor, places: int) -> torch.Tensor:
    """Return the token so many places on, none at the end of a text: (b, n).

    >>> later(torch.tensor([[5, 6, 7]]), 2)
    tensor([[   7, -100, -100]])
    """
    return functional.pad(ids[:, places:], (0, min(places, ids.shape[1])), value=IGNORED)


def following(loss: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the tokens (b, n) of a batch whose next one a loss compares logits with at each place.

    None where it is not known to do so; a loss that is found for a network says it by `following`.
    """
    if loss is default_loss:
        found = kwargs.get("labels", kwargs.get("input_ids"))
    else:
        found = getattr(loss, "following", lambda *call: None)(args, kwargs)
    return found if isinstance(found, torch.Tensor) and found.ndim == 2 else None


class _Kept(Protocol):
    """What a step forward keeps for the step back."""

    saved_tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        norms = torch.empty(len(logits), dtype=wide, device=logits.device)
        for part in _pieces(logits):
            norms[part] = logits[part].to(wide).logsumexp(-1)
        counted = targets >= 0
        picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, targets, norms)
        return ((norms - picked) * counted).sum() / counted.sum()

    @staticmethod
    def backward(ctx: _Kept, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        counted = targets >= 0
        share = outer * counted / counted.sum()
        index = targets.clamp(min=0).unsqueeze(1)
        if torch.is_grad_enabled():  # asked to be differentiable itself
            chosen = torch.zeros_like(logits).scatter_(1, index, 1.0)
            return (logits.softmax(-1) - chosen) * share.unsqueeze(1), None
        made = again(logits)
        for part in _pieces(logits):
            torch.sub(logits[part], norms[part].unsqueeze(1), out=made[part])
            made[part].exp_().mul_(share[part].unsqueeze(1))
        made.scatter_add_(1, index, -share.to(made.dtype).unsqueeze(1))
        return made, None


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, logits.shape[-1]))
    return (slice(at, at + rows) for at in range(0, len(logits), rows))


def default_loss(outputs: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Next-token cross-entropy where results are logits over `input_ids`; else against the
    model's own predictions (cross-entropy with its argmax over the last dimension)."""
    logits = first_floating(outputs)
    if is_value(logits):
        return logits.square().mean()
    ids = kwargs.get("input_ids")
    if ids is not None and logits.ndim == 3 and logits.shape[:2] == ids.shape:
        return next_token(logits, ids)
    flat = logits.reshape(-1, logits.shape[-1]) if logits.ndim != 4 else \
        logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return cross_entropy(flat, flat.detach().argmax(-1))


def is_value(result: torch.Tensor) -> bool:
    """Whether a result is a value or values (b, …, 1), and no logits of classes to choose from."""
    return not result.ndim or (result.shape[1] if result.ndim == 4 else result.shape[-1]) == 1


def compares_classes(loss: object) -> bool:
    """True if a loss is known to be a cross-entropy of the first result's classes.

    A loss that is found for a network says so by `classes`; of any other nothing is known.
    """
    return loss is default_loss or bool(getattr(loss, "classes", False))


def first_floating(outputs: Sequence[Any]) -> torch.Tensor:
    """Return the first floating-point result (a model's logits); single numbers stand behind.

    Raises SpaError if there is none: nothing is learned from whole numbers.

    >>> first_floating([torch.tensor([1, 2]), torch.tensor(0.5), torch.ones(2, 3)]).shape
    torch.Size([2, 3])
    """
    found = [x for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not found:
        kinds = sorted({str(x.dtype) for x in outputs if isinstance(x, torch.Tensor)})
        raise SpaError("no result of the network is in floating point",
                       why=f"its results are {', '.join(kinds) or 'no tensors'}: no loss and no "
                           "distance has a gradient by weights there",
                       fix="give a network that returns logits (argmax and the like left out), or "
                           "what asks for no data: --importance magnitude, --calibration none")
    return next((x for x in found if x.ndim), found[0])


def perplexity(module: Callable[..., Any], ids: torch.Tensor, *, batch: int = 4) -> float:
    """Return exp(mean next-token loss) of a causal LM over windows `ids` (n, length)."""
    total, count = 0.0, 0
    with torch.no_grad():
        for part in _parts(ids, batch):
            logits = module(input_ids=part).logits[:, :-1]
            target = part[:, 1:]
            total += functional.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1),
                reduction="sum").item()
            count += target.numel()
    return float(torch.tensor(total / count).exp())


def _parts(ids: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    yield from ids.split(batch)


def labelled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with labels; those of a sequence are shifted, as transformers does."""
    if logits.ndim == 3 and labels.shape == logits.shape[:2]:
        return next_token(logits, labels)
    return functional.cross_entropy(logits, labels)


def divergence(pruned: torch.Tensor, dense: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(softmax(dense / T) ‖ softmax(pruned / T)), mean over positions (Hinton et al. 2015).

    The classes are the last dimension; the channels, of a map (b, c, h, w). Of one value, which is
    no choice, it is half a squared error.
    """
    if is_value(pruned):
        return (pruned - dense).square().mean() / 2
    if pruned.ndim == 4:
        pruned, dense = pruned.movedim(1, -1), dense.movedim(1, -1)
    classes = pruned.shape[-1]
    if pruned.numel() > CHUNK and not torch.is_grad_enabled():
        return _divergence_in_pieces(pruned.reshape(-1, classes), dense.reshape(-1, classes),
                                     temperature)
    log_p = functional.log_softmax(pruned.reshape(-1, classes) / temperature, -1)
    log_q = functional.log_softmax(dense.reshape(-1, classes) / temperature, -1)
    return functional.kl_div(log_p, log_q, reduction="batchmean",
                             log_target=True) * temperature ** 2


def _divergence_in_pieces(pruned: torch.Tensor, dense: torch.Tensor,
                          temperature: float) -> torch.Tensor:
    """The same of rows (n, classes), without a gradient and without copies of them all."""
    total = torch.zeros((), dtype=torch.float64)
    for part in _pieces(pruned):
        log_q = functional.log_softmax(dense[part] / temperature, -1)
        log_p = functional.log_softmax(pruned[part] / temperature, -1)
        total += able(log_q.exp() * (log_q - log_p)).sum(dtype=torch.float64).cpu()
    return (total / len(pruned) * temperature ** 2).to(pruned.dtype).to(pruned.device)


def distance(pruned: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """KL divergence over the last dimension (channels of a map), half a squared error of one."""
    return divergence(pruned, dense, 1.0)


def drawn(results: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the mean log-likelihood of results drawn from the prediction, and of how many.

    Its gradient's outer product, times the number, is the Hessian of `distance` in expectation.
    """
    if is_value(results):
        return (results * torch.randn_like(results)).mean(), results.numel()
    flat = (results.movedim(1, -1) if results.ndim == 4 else results).flatten(0, -2)
    with torch.no_grad():
        labels = torch.multinomial(functional.softmax(flat.float(), -1), 1).squeeze(1)
    return functional.cross_entropy(flat, labels), len(flat)
