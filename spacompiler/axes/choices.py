"""Choices: which slices of atoms stay, and so which positions of a tensor.

>>> half = Atom(3, 0)
>>> rows = Sum((half, half), 6)                # two halves that are tied slice by slice
>>> keep_mask([rows], {half: Choice(np.array([True, False, True]))}).tolist()
[True, False, True, True, False, True]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod

import numpy as np

from .expressions import Array, Atom, Expr, Sum, atoms, resolve


@dataclass(frozen=True, slots=True)
class Choice:
    """Which slices of an atom stay: `table[outer coordinates..., own index]` is True if kept.

    Without `outers` the table is one-dimensional. A *fibred* atom may keep other indices inside
    each slice of its outer atoms, so long as the counts agree: `count` slices (inside each outer
    one).
    """

    table: Array
    outers: tuple[Atom, ...] = ()
    count: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", int(self.table.sum(-1).max()))


Choices = Mapping[Atom, Choice]


def coordinates(e: Expr, only: Collection[Atom] | None = None) -> list[tuple[Atom, Array]]:
    """Return, for each mention of an atom, its coordinate at every position (-1: not there).

    With `only`, those of other atoms are left out.
    """
    e = resolve(e)
    if isinstance(e, Atom):
        return [(e, np.arange(e.size))] if only is None or e in only else []
    found: list[tuple[Atom, Array]] = []
    offset, inner = 0, e.size
    for part in e.parts:
        if isinstance(e, Sum):
            for atom, at in coordinates(part, only):
                full = np.full(e.size, -1)
                full[offset : offset + part.size] = at
                found.append((atom, full))
            offset += part.size
        else:
            inner //= part.size
            if own := coordinates(part, only):
                index = np.arange(e.size) // inner % part.size
                found.extend((atom, at[index]) for atom, at in own)
    if isinstance(e, Sum) and e.order is not None:
        found = [(atom, at[e.order]) for atom, at in found]
    return found


def kept_size(e: Expr, choices: Choices) -> int:
    """Return the size of a dimension after removal."""
    e = resolve(e)
    if isinstance(e, Atom):
        return choices[e].count if e in choices else e.size
    sizes = [kept_size(part, choices) for part in e.parts]
    return sum(sizes) if isinstance(e, Sum) else prod(sizes)


def keep_mask(dims: Sequence[Expr], choices: Choices) -> Array:
    """Return a boolean mask, broadcastable to the tensor, of the positions that stay.

    A position stays if each of its coordinates is kept; a fibred atom is looked up at the
    coordinates of its outer atoms, wherever in the tensor these stand.
    """
    rank = len(dims)
    where: list[tuple[Atom, Array]] = []
    for axis, e in enumerate(dims):
        shape = [1] * rank
        shape[axis] = e.size
        where.extend((atom, at.reshape(shape)) for atom, at in coordinates(e))
    mask = np.ones([1] * rank, dtype=bool)
    for atom, at in where:
        choice = choices.get(atom)
        if choice is not None:
            outer = [_joint(where, o) for o in choice.outers]
            mask = mask & (choice.table[(*outer, at)] | (at < 0))
    return mask


def _joint(where: list[tuple[Atom, Array]], outer: Atom) -> Array:
    """The outer atom's coordinate: the one mention that is present at each place."""
    return reduce(np.maximum, (other for atom, other in where if atom is outer))


def take(array: Array, dims: Sequence[Expr], choices: Choices) -> Array:
    """Return the kept part of an array (a view of `array` where nothing is removed).

    >>> half = Atom(3, 0)
    >>> kept = {half: Choice(np.array([True, False, True]))}
    >>> take(np.arange(6), [Sum((half, half), 6)], kept).tolist()
    [0, 2, 3, 5]
    """
    per_axis = indices(dims, choices)
    if per_axis is None:
        mask = np.broadcast_to(keep_mask(dims, choices), array.shape)
        return array[mask].reshape([kept_size(e, choices) for e in dims])
    for axis, index in enumerate(per_axis):
        if index is not None:
            array = np.take(array, index, axis=axis)
    return array


JOINT = -np.ones(1, dtype=int)
"""In place of a dimension's positions: which stay depends on other dimensions, too."""


def indices(dims: Sequence[Expr], choices: Choices,
            known: dict[Expr, Array | None] | None = None) -> list[Array | None] | None:
    """Return kept positions per dimension (None: all), or None if dimensions depend jointly.

    `known` holds what was said of dimensions under the same choices before, and is added to.
    """
    known = {} if known is None else known
    for e in dims:
        if e not in known:
            known[e] = _positions(e, choices)
    found = [known[e] for e in dims]
    return None if any(at is JOINT for at in found) else found


def _positions(e: Expr, choices: Choices) -> Array | None:
    """The positions of a dimension that stay: None for all, JOINT where they depend on others."""
    mentioned = set(atoms(e))
    mine = mentioned & choices.keys()
    if any(o not in mentioned for a in mine for o in choices[a].outers):
        return JOINT
    return np.flatnonzero(keep_mask([e], choices)) if mine else None
