"""Slice stored arrays by a plan, each read once, and correct the gains of RMSNorms.

From width d to d', RMSNorm keeps its meaning with gain * sqrt(d/d') and eps * d/d': the mean of
squares over what stays is d/d' times the mean over all, removed slices being zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...axes.choices import Choices, indices, keep_mask, kept_size
from ...axes.expressions import Atom, Expr
from ...groups.solution import Solution
from ...plan.effects import NormChange, norm_changes
from ...store.mapped import let_go
from ...store.room import Room
from ..trace import Trace


def kept(solution: Solution, name: str, value: torch.Tensor, choices: Choices) -> torch.Tensor:
    """Return what the pruned program has of a dense value: positions count what stays."""
    part = cut(value, solution.solver.dims[name], choices)
    label = solution.solver.labels.get(name)
    if label is None or label.kind != "position" or not isinstance(label.axis, Atom) \
            or label.axis not in choices:
        return part
    stays = torch.from_numpy(choices[label.axis].table)
    return (stays.cumsum(0) - 1)[part.long()].to(part.dtype)


class Slicer:
    """Makes pruned arrays from dense ones, by the name of any parameter or buffer.

    Large ones lie in a `room` where there is one, else in memory.
    """

    def __init__(self, trace: Trace, solution: Solution, choices: Choices,
                 room: Room | None = None) -> None:
        self._stored = {**trace.program.state_dict, **trace.program.constants}
        self._tied, self._dims, self.choices = trace.tied, solution.weights(), choices
        self._repaired, self._room = trace.repaired, room
        self._stays: dict[str, bool] = {}
        self._positions: dict[Expr, np.ndarray | None] = {}
        self._gains: Mapping[str, NormChange] = {
            change.norm.gain: change for change in norm_changes(solution, choices)}

    def names(self) -> list[str]:
        """Return the names of all arrays that can be sliced, ties included."""
        return [n for n in self._stored if n in self._tied]

    def dims(self, name: str) -> tuple[Expr, ...]:
        """Return the axes of a stored array."""
        return self._dims[self._tied.get(name, name)]

    def corrects(self, first: str) -> bool:
        """True of a gain, by its first name, that a plan makes other numbers of."""
        return first in self._gains

    def untouched(self, name: str) -> bool:
        """True if a plan and its repair leave an array as it is."""
        first = self._tied[name]
        if first not in self._stays:
            self._stays[first] = first not in self._gains and all(
                kept_size(e, self.choices) == e.size for e in self._dims.get(first, ()))
        return self._stays[first] and first not in self._repaired

    def array(self, name: str, *, double: bool = False,
              choices: Choices | None = None) -> torch.Tensor:
        """Return the pruned array (the dense one itself where nothing changes).

        With `double`, gains that are corrected are returned in float64; others keep their type.
        """
        return self.sliced(name, self._stored[name], double=double, choices=choices)

    def sliced(self, name: str, tensor: torch.Tensor, *, double: bool = False,
               choices: Choices | None = None) -> torch.Tensor:
        """Return the pruned array made from given values of a dense array."""
        first = self._tied.get(name, name)
        if self.untouched_under(first, choices):
            return tensor
        dense = tensor.detach()
        tensor = cut(dense, self._dims[first], choices or self.choices, self._room,
                     None if choices else self._positions)
        let_go([dense, *([] if self._room is None else [tensor])])
        change = self._gains.get(first)
        if change is not None:
            tensor, offset = tensor.double() if double else tensor, change.norm.offset
            tensor = ((tensor.double() + offset) * change.gain - offset).to(tensor.dtype)
        return tensor

    def untouched_under(self, first: str, choices: Choices | None) -> bool:
        """True if an array, by its first name, stays under these choices (None: the plan's)."""
        return first not in self._dims or (self.untouched(first) and choices is None)


BLOCK = 1 << 22
"""Entries of an array that are selected at a time."""


def cut(tensor: torch.Tensor, dims: tuple[Expr, ...], choices: Choices,
        room: Room | None = None,
        known: dict[Expr, np.ndarray | None] | None = None) -> torch.Tensor:
    """Return the kept part of a tensor, contiguous; that of a large one lies in a room.

    `known` are positions of dimensions under these choices, see `indices`.
    """
    per_axis = indices(dims, choices, known)
    if per_axis is None:
        mask = torch.from_numpy(keep_mask(dims, choices)).expand(tensor.shape)
        return tensor[mask].reshape([kept_size(e, choices) for e in dims])
    found = {a: torch.from_numpy(index) for a, index in enumerate(per_axis) if index is not None}
    if not found or tensor.numel() <= BLOCK:
        return _select(tensor, found)
    axis, rows = next(iter(found.items()))  # by blocks: what lies between is never held whole
    shape, at = [kept_size(e, choices) for e in dims], 0
    made = tensor.new_empty(shape) if room is None else room.empty(shape, tensor.dtype)
    for block in rows.split(max(1, BLOCK * len(rows) // tensor.numel())):
        made.narrow(axis, at, len(block)).copy_(_select(tensor, {**found, axis: block}))
        at += len(block)
    return made


def _select(tensor: torch.Tensor, index: Mapping[int, torch.Tensor]) -> torch.Tensor:
    for axis, kept in index.items():
        tensor = _taken(tensor, axis, kept)
    return tensor


def _taken(tensor: torch.Tensor, axis: int, kept: torch.Tensor) -> torch.Tensor:
    """Select along one axis; of short floats torch picks single ones at a fifth of numpy's speed.
    """
    if axis == 0 or tensor.itemsize != 2 or tensor.device.type != "cpu":
        return tensor.index_select(axis, kept)
    bits = tensor.view(torch.int16).numpy().take(kept.numpy(), axis)
    return torch.from_numpy(bits).view(tensor.dtype)
