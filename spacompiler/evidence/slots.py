"""Where a group lies in a tensor: `slots` maps every position to the slice that it belongs to.

So any statistic, of a weight or of an activation, sums onto a group in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch

from ..axes.choices import coordinates
from ..axes.expressions import Expr, atoms, resolve
from ..groups.solution import Group


def slots(dims: Sequence[Expr], dim: int, group: Group) -> tuple[list[int], np.ndarray]:
    """Return the dimensions that decide a position's slice, and the slice at each position.

    The slice is a flat index into `group.shape`; -1 where the group has no coordinate.
    """
    wanted = (*group.outers, group.atom)
    places: dict[int, list[tuple[int, np.ndarray]]] = {}
    for axis, e in enumerate(dims):
        for atom, at in coordinates(e, wanted):
            for k, target in enumerate(wanted):
                if atom is target and (axis == dim or k < len(wanted) - 1):
                    places.setdefault(axis, []).append((k, at))
    axes = sorted(places)
    shape = [dims[axis].size for axis in axes]
    total = [np.full(shape, -1) for _ in wanted]
    for i, axis in enumerate(axes):
        spread = [1] * len(axes)
        spread[i] = shape[i]
        for k, at in places[axis]:
            total[k] = np.maximum(total[k], at.reshape(spread))
    flat = np.zeros(shape, dtype=np.int64)
    for k, atom in enumerate(wanted):
        flat = flat * atom.size + total[k]
    missing = np.any([t < 0 for t in total], axis=0)
    return axes, np.where(missing, -1, flat)


def rows(tensor: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group) -> torch.Tensor:
    """Return a tensor with the group's axes first: (*group.shape, rest)."""
    axes, slot = slots(dims, dim, group)
    rest = [d for d in range(tensor.ndim) if d not in axes]
    flat = tensor.permute(*axes, *rest).reshape(slot.size, -1)
    slot = slot.reshape(-1)
    order = np.argsort(slot, kind="stable")[int((slot < 0).sum()):]
    if np.array_equal(order, np.arange(slot.size)):  # the usual case: nothing to gather
        return flat.reshape(*group.shape, -1)
    return flat[torch.from_numpy(order)].reshape(*group.shape, -1)


BLOCK = 1 << 18
"""Entries of an array that are taken in at a time: what is made of them stays near the core."""


def deciding(dims: Sequence[Expr], dim: int, group: Group) -> tuple[int, ...]:
    """Return the dimensions that decide a position's slice: those of `slots`."""
    outer = set(group.outers)
    return tuple(axis for axis, e in enumerate(dims) if any(
        atom in outer or (axis == dim and atom is group.atom) for atom in atoms(e)))


def sums_of(tensor: torch.Tensor, several: Sequence[tuple[int, ...]],
            p: int) -> list[torch.Tensor]:
    """Return sum |w|^p over all dimensions but some, in float64, for each of several sets of such.

    The array is read once, where it lies: nothing of its size is allocated.
    """
    tensor = tensor.detach()
    if any(len(axes) == tensor.ndim for axes in several):  # nothing to sum over
        return [_over(tensor.double().abs().pow(p), axes) for axes in several]
    wide = torch.promote_types(tensor.dtype, torch.float32)
    lengths = max(1, BLOCK * len(tensor) // max(1, tensor.numel()))
    found: list[list[torch.Tensor]] = [[] for _ in several]
    room = tensor.new_empty((min(lengths, len(tensor)), *tensor.shape[1:]), dtype=wide)
    for part in tensor.split(lengths):
        powered = room[:len(part)]
        if p == 2 and part.dtype == wide:
            torch.square(part, out=powered)
        else:
            powered.copy_(part)
            powered.square_() if p == 2 else powered.abs_().pow_(p)
        for parts, axes in zip(found, several, strict=True):
            parts.append(_over(powered, axes).double())
    return [torch.cat(parts) if 0 in axes else sum(parts, torch.zeros(()))
            for parts, axes in zip(found, several, strict=True)]


def _over(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Sum over all dimensions but some, over the first one first: the others lie side by side."""
    rest = [d for d in range(values.ndim) if d not in axes]
    if rest[:1] == [0] and len(rest) > 1:
        values = values.sum(0, keepdim=True)
    return values.sum(rest) if rest else values


def onto_group(sums: torch.Tensor, dims: Sequence[Expr], dim: int,
               group: Group) -> tuple[torch.Tensor, float]:
    """Add sums over all but the deciding dimensions up onto the group: `group.shape`.

    Returns them and of how many entries of the array each is.
    """
    if not group.outers and resolve(dims[dim]) is group.atom:
        return sums, prod(e.size for e in dims) / group.size
    axes, slot = slots(dims, dim, group)
    index = torch.from_numpy(slot.reshape(-1))
    here = index >= 0
    total = torch.zeros(prod(group.shape), dtype=torch.float64)
    total.index_add_(0, index[here], sums.reshape(-1)[here])
    rest = prod(e.size for d, e in enumerate(dims) if d not in axes)
    return total.reshape(group.shape), int(here.sum()) * rest / prod(group.shape)


def powers(tensor: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group,
           p: int) -> tuple[torch.Tensor, float]:
    """Return sum |w|^p onto the group (`group.shape`) and how many weights a slice has."""
    (sums,) = sums_of(tensor, [deciding(dims, dim, group)], p)
    return onto_group(sums, dims, dim, group)


def onto(values: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group) -> torch.Tensor:
    """Sum a statistic of a tensor onto a group: (rest, slices), `rest` the other dimensions.

    `values` broadcasts to the tensor's shape (dimensions of one were summed before).
    """
    axes, slot = slots(dims, dim, group)
    rest = [d for d in range(values.ndim) if d not in axes]
    shape = [slot.shape[axes.index(d)] if d in axes else values.shape[d]
             for d in range(values.ndim)]
    flat = values.expand(shape).permute(*rest, *axes).reshape(-1, slot.size)
    slices = prod(group.shape)
    even = np.repeat(np.arange(slices), slot.size // slices)
    if np.array_equal(slot.reshape(-1), even):  # the usual case: slices side by side, all alike
        return flat.double() if slices == slot.size else \
            flat.reshape(len(flat), slices, -1).sum(-1, dtype=torch.float64)
    index = torch.from_numpy(slot.reshape(-1))
    total = torch.zeros(flat.shape[0], slices, dtype=torch.float64)
    return total.index_add_(1, index[index >= 0], flat[:, index >= 0].double())


def by_channel(values: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group,
               then: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum values over each channel, apply `then`, and sum channels onto the group: (slices,).

    A channel is one index of `dim` (under one outer slice): a head has as many as it has dims.
    """
    axes, slot = slots(dims, dim, group)
    rest = [d for d in range(values.ndim) if d not in axes]
    values = (values.sum(rest, keepdim=True) if rest else values).cpu().double()
    if axes == [dim]:
        return onto(then(values), dims, dim, group).sum(0)
    size, slices = dims[dim].size, prod(group.shape)
    at = np.arange(size).reshape([-1 if a == dim else 1 for a in axes])
    index = torch.from_numpy(np.where(slot < 0, -1, slot * size + at).reshape(-1))
    flat = values.permute(*rest, *axes).reshape(-1)
    sums = torch.zeros(slices * size, dtype=torch.float64)
    sums.index_add_(0, index[index >= 0], flat[index >= 0])
    return then(sums).reshape(slices, size).sum(1)
