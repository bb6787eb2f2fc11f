"""Cross-entropy over large vocabularies without copies of the logits.

torch's function holds the log-probabilities beside the logits, and the gradient goes through one
more array of that size for each slice and reshape on the way. This one works through the rows a few
at a time: forward keeps one number a row, backward makes the gradient and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

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
    return cross_entropy(logits, functional.pad(ids[:, 1:], (0, 1), value=IGNORED))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        norms = torch.empty(len(logits), dtype=wide)
        for part in _pieces(logits):
            norms[part] = logits[part].to(wide).logsumexp(-1)
        counted = targets >= 0
        picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        ctx.save_for_backward(logits, targets, norms)
        return ((norms - picked) * counted).sum() / counted.sum()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        counted = targets >= 0
        share = outer * counted / counted.sum()
        index = targets.clamp(min=0).unsqueeze(1)
        if torch.is_grad_enabled():  # asked to be differentiable itself
            chosen = torch.zeros_like(logits).scatter_(1, index, 1.0)
            return (logits.softmax(-1) - chosen) * share.unsqueeze(1), None
        made = torch.empty_like(logits)
        for part in _pieces(logits):
            torch.sub(logits[part], norms[part].unsqueeze(1), out=made[part])
            made[part].exp_().mul_(share[part].unsqueeze(1))
        made.scatter_add_(1, index, -share.to(made.dtype).unsqueeze(1))
        return made, None


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, logits.shape[-1]))
    return (slice(at, at + rows) for at in range(0, len(logits), rows))
