"""Inputs of a network as calls, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Batch = tuple[tuple[Any, ...], dict[str, Any]]


Inputs = tuple[Any, ...] | dict[str, Any]


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of inputs given as a tuple, a dict of keywords, or (tuple, dict)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return tuple(inputs), {}


def examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of examples in a batch: the first size of its first tensor."""
    leaves = pytree.tree_leaves((args, kwargs))
    return next((v.shape[0] for v in leaves if isinstance(v, torch.Tensor) and v.ndim), 1)


def singles(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield the examples of a batch as batches of one."""
    yield from (some(batch, count, slice(i, i + 1)) for i in range(count))


def some(batch: Batch, count: int, which: slice) -> Batch:
    """Return a batch of some examples of one that has `count`."""
    def own(value: object) -> Any:
        each = isinstance(value, torch.Tensor) and value.ndim and len(value) == count
        return value[which] if each else value  # type: ignore[index]

    found: Batch = pytree.tree_map(own, batch)
    return found


def again(batch: Batch, times: int, by_example: Sequence[bool]) -> Batch:
    """Return a batch of one example so many times: of its tensors those that are `by_example`.

    Raises ValueError where these are another number.
    """
    leaves, spec = pytree.tree_flatten(batch)
    which = iter(by_example)
    made = [torch.cat([v] * times) if isinstance(v, torch.Tensor) and next(which, None) else v
            for v in leaves]
    if sum(isinstance(v, torch.Tensor) for v in leaves) != len(by_example):
        raise ValueError("inputs are others than were traced")
    found: Batch = pytree.tree_unflatten(made, spec)
    return found


def first(batch: Batch) -> torch.Tensor:
    """Return the first tensor of a batch, one without values where it has none."""
    leaves = pytree.tree_leaves(batch)
    return next((v for v in leaves if isinstance(v, torch.Tensor)), torch.zeros(0))


def amount(batch: Batch) -> int:
    """Return how many tokens a batch holds, or examples where its first tensor holds none."""
    given = first(batch)
    return given.numel() if not given.is_floating_point() else examples(*batch)
