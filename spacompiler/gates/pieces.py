"""Batches cut to the size of a step: some examples, and of tokens some length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..evidence.calls import Batch, examples


def pieces(batches: Sequence[Batch], rows: int = 0, length: int = 0) -> list[Batch]:
    """Return batches cut to `rows` examples, and windows of tokens to `length` (0: as they are).

    Only tensors of one entry an example are cut; only where inputs are tokens, (rows, tokens), is
    their length.
    """
    made = []
    for batch in batches:
        count = examples(*batch)
        for at in range(0, count, rows or count):
            part = _narrowed(batch, 0, count, at, min(rows or count, count - at))
            tokens = _tokens(part)
            if not length or tokens <= length:
                made.append(part)
                continue
            made.extend(_narrowed(part, 1, tokens, start, length)
                        for start in range(0, tokens - length + 1, length))
    return made


def _tokens(batch: Batch) -> int:
    first = next((x for x in pytree.tree_leaves(batch) if isinstance(x, torch.Tensor)), None)
    return 0 if first is None or first.is_floating_point() or first.ndim != 2 else first.shape[1]


def _narrowed(batch: Batch, dim: int, size: int, at: int, count: int) -> Batch:
    def cut(x: object) -> Any:
        fits = isinstance(x, torch.Tensor) and x.ndim > dim and x.shape[dim] == size
        return x.narrow(dim, at, count) if fits and isinstance(x, torch.Tensor) else x

    made: Batch = pytree.tree_map(cut, batch)
    return made


def endless(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """Yield batches for ever, in a new order each time, that follows from the seed."""
    draws = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(batches), generator=draws).tolist():
            yield batches[i]
