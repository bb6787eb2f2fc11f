"""Give a pruned module arrays of its own: what the user's model holds too is copied, nothing else.

Emitters put new tensor objects over the dense arrays that a plan leaves alone, so that flags are
not shared and no second model is held while they work. What stays with the result at the end gets
memory of its own here; views of one memory are views of one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def fresh(tensor: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Return values (default: the tensor's own) as a new object of its kind, with its flag."""
    held = (tensor if values is None else values).detach()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(held, requires_grad=tensor.requires_grad)
    return held


def tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield every tensor that a module holds: parameters, buffers, and plain attributes."""
    for part in module.modules():
        for value in vars(part).values():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    yield leaf


def set_apart(module: nn.Module, others: Iterable[torch.Tensor]) -> None:
    """Copy the memory of a module's tensors that `others` use too, in place."""
    taken = {key for key in map(_memory, others) if key is not None}
    mine: dict[Any, dict[int, torch.Tensor]] = {}
    for tensor in tensors(module):
        key = _memory(tensor)
        if key in taken:
            mine.setdefault(key, {})[id(tensor)] = tensor
    for sharing in mine.values():
        for views in _spans(list(sharing.values())):
            _copy(views)


def _memory(tensor: torch.Tensor) -> Any:
    """What identifies the memory of a tensor; None where it has none."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or not tensor.numel():
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


def _ends(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its memory, and the one after its last."""
    last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + int(last) + 1) * tensor.itemsize


def _spans(views: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Sort views of one memory into those that overlap."""
    found: list[list[torch.Tensor]] = []
    until = -1
    for view in sorted(views, key=_ends):
        first, end = _ends(view)
        if first >= until:
            found.append([])
        found[-1].append(view)
        until = max(until, end)
    return found


def _copy(views: list[torch.Tensor]) -> None:
    """Move overlapping views to a copy of the bytes that they span."""
    first, end = min(_ends(v)[0] for v in views), max(_ends(v)[1] for v in views)
    held = views[0].untyped_storage()
    raw = torch.empty(0, dtype=torch.uint8, device=views[0].device).set_(
        held, first, (end - first,), (1,)).clone().untyped_storage()
    for view in views:
        at = (_ends(view)[0] - first) // view.itemsize
        view.data = torch.empty(0, dtype=view.dtype, device=view.device).set_(
            raw, at, view.shape, view.stride())
