"""Axes: every tensor dimension is an expression over atoms.

An `Atom(n)` is n interchangeable slices. `Prod` is a flattened nest (outer to inner: heads x
head_dim), `Sum` a concatenation (q + k + v), which may be dealt out in another order. An atom that
must have structure is *bound* to it (see `space`), and everything that mentions the atom sees the
refinement.

>>> heads, dims = Atom(3, 0), Atom(4, 1)
>>> rows = product((heads, dims))
>>> dims.bound = concat((Atom(2, 2), Atom(2, 3)))
>>> show(rows)
'3*(2+2)'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Union

import numpy as np

Array = np.ndarray


class Atom:
    """`size` interchangeable slices; `bound` is its refinement, `reasons` why it is frozen."""

    __slots__ = ("bound", "reasons", "serial", "size")

    def __init__(self, size: int, serial: int, reasons: tuple[str, ...] = ()) -> None:
        self.size, self.serial, self.reasons = size, serial, reasons
        self.bound: Expr | None = None

    @property
    def frozen(self) -> bool:
        """True if no slice may go; `reasons` say why."""
        return bool(self.reasons)

    def __repr__(self) -> str:
        return f"Atom({self.size}#{self.serial}{'!' if self.frozen else ''})"


@dataclass(slots=True, eq=False)
class Prod:
    """A flattened nest, outer to inner; `Prod(())` is the dimension of size one."""

    parts: tuple[Expr, ...]
    size: int


@dataclass(slots=True, eq=False)
class Sum:
    """A concatenation; `order`, if given, deals it out: position p holds its slice `order[p]`."""

    parts: tuple[Expr, ...]
    size: int
    order: Array | None = None


Expr = Union[Atom, Prod, Sum]  # noqa: UP007  (a forward reference)
ONE = Prod((), 1)


def product(parts: Iterable[Expr]) -> Expr:
    """Nest expressions, dropping ones and flattening nests inside nests."""
    flat: list[Expr] = []
    for part in map(resolve, parts):
        flat.extend(part.parts if isinstance(part, Prod) else (part,))
    if not flat:
        return ONE
    return flat[0] if len(flat) == 1 else Prod(tuple(flat), prod(p.size for p in flat))


def concat(parts: Iterable[Expr]) -> Expr:
    """Concatenate expressions, flattening concatenations inside concatenations."""
    flat: list[Expr] = []
    terms = list(map(resolve, parts))
    dealt, size = False, 0
    for term in terms:
        flat.extend(term.parts if isinstance(term, Sum) else (term,))
        dealt = dealt or (isinstance(term, Sum) and term.order is not None)
        size += term.size
    if dealt:
        return Sum(tuple(flat), size, _orders(terms))
    return flat[0] if len(flat) == 1 else Sum(tuple(flat), size)


def _orders(terms: Iterable[Expr]) -> Array:
    """The order of a concatenation of terms, some of which are dealt out."""
    orders, offset = [], 0
    for term in terms:
        inner = term.order if isinstance(term, Sum) else None
        orders.append(offset + (np.arange(term.size) if inner is None else inner))
        offset += term.size
    return np.concatenate(orders)


def deal(e: Expr, order: Array) -> Expr:
    """Return the dimension whose position p is position `order[p]` of `e`.

    >>> show(deal(deal(Atom(3, 0), np.array([2, 0, 1])), np.array([1, 2, 0])))
    '3'
    """
    e = resolve(e)
    parts = e.parts if isinstance(e, Sum) else (e,)
    if isinstance(e, Sum) and e.order is not None:
        order = e.order[order]
    if np.array_equal(order, np.arange(e.size)):
        return concat(parts)
    return Sum(tuple(parts), e.size, order)


def resolve(e: Expr) -> Expr:
    """Return the normal form: bindings followed, nests flat, a concatenated outer factor out.

    `(a+b)*c` becomes `a*c + b*c`, so that cuts of a dimension always stand at its top.
    """
    if isinstance(e, Atom):
        if e.bound is None:
            return e
        e.bound = resolve(e.bound)
        return e.bound
    if _is_normal(e):
        return e
    if isinstance(e, Sum):
        whole = concat(e.parts)
        return whole if e.order is None else deal(whole, e.order)
    flat = product(e.parts)
    if isinstance(flat, Prod) and flat.parts and isinstance(flat.parts[0], Sum):
        outer, rest = flat.parts[0], flat.parts[1:]
        whole = concat([resolve(product((term, *rest))) for term in outer.parts])
        inner = flat.size // outer.size
        return whole if outer.order is None else deal(
            whole, (outer.order[:, None] * inner + np.arange(inner)).ravel())
    return flat


def _is_normal(e: Prod | Sum) -> bool:
    """Whether `resolve` would find nothing to change."""
    kind = type(e)
    for part in e.parts:
        if isinstance(part, Atom):
            if part.bound is not None:
                return False
        elif type(part) is kind or not _is_normal(part):
            return False
    if isinstance(e, Sum):
        return len(e.parts) > 1 or e.order is not None
    return not e.parts or (len(e.parts) > 1 and not isinstance(e.parts[0], Sum))


def walk(e: Expr) -> list[Atom]:
    """Return every mention of an unbound atom, left to right."""
    return mentions(resolve(e))


def mentions(e: Expr) -> list[Atom]:
    """Return the mentions in a normal form."""
    if isinstance(e, Atom):
        return [e]
    found: list[Atom] = []
    _collect(e.parts, found)
    return found


def _collect(parts: Iterable[Expr], found: list[Atom]) -> None:
    """Append the mentions in parts of a normal form, whose parts are normal forms."""
    for part in parts:
        if isinstance(part, Atom):
            found.append(part)
        else:
            _collect(part.parts, found)


def atoms(e: Expr) -> list[Atom]:
    """Return the distinct atoms of an expression in order of first mention."""
    if isinstance(e, Atom) and e.bound is None:
        return [e]
    found = walk(e)
    return found if len(found) == 1 else list(dict.fromkeys(found))


def is_frozen(e: Expr) -> bool:
    """True if no slice of the dimension can be removed."""
    return all([a.reasons for a in mentions(resolve(e))])


def reasons(e: Expr) -> list[str]:
    """Return why a dimension (or part of it) is frozen, first reason first."""
    e = resolve(e)
    if not isinstance(e, Atom) and not walk(e):
        return ["single slices: nothing can be removed"] if e.size > 1 else ["size one"]
    return list(dict.fromkeys(r for a in walk(e) for r in a.reasons))


def show(e: Expr, names: Mapping[Atom, str] | None = None) -> str:
    """Print an expression: sizes (or names) joined by `*` and `+`; `!` marks frozen atoms."""
    e = resolve(e)
    if isinstance(e, Atom):
        label = (names or {}).get(e, str(e.size))
        return f"{label}!" if e.frozen else label
    if not e.parts:
        return "1"
    if isinstance(e, Sum):
        text = "+".join(show(p, names) for p in e.parts)
        return text if e.order is None else f"deal({text})"
    return "*".join(
        f"({show(p, names)})" if isinstance(p, Sum) and p.order is None else show(p, names)
        for p in e.parts)


def cells(e: Expr) -> list[tuple[Expr, Array]]:
    """Return the products of atoms that make up a dimension, each with its positions."""
    e = resolve(e)
    if isinstance(e, Sum):
        return _cells_of_sum(e)
    at = np.arange(e.size)
    parts = e.parts if isinstance(e, Prod) else ()
    inner = next((i for i, part in enumerate(parts) if isinstance(part, Sum)), None)
    if inner is None:
        return [(e, at)]
    grid = at.reshape(prod(p.size for p in parts[:inner]), parts[inner].size, -1)
    found = []
    for term, where in cells(parts[inner]):
        place = grid[:, where].ravel()
        for cell, within in cells(product((*parts[:inner], term, *parts[inner + 1 :]))):
            found.append((cell, place[within]))
    return found


def _cells_of_sum(e: Sum) -> list[tuple[Expr, Array]]:
    position = np.arange(e.size) if e.order is None else np.argsort(e.order)
    found: list[tuple[Expr, Array]] = []
    offset = 0
    for part in e.parts:
        found.extend((cell, position[offset + at]) for cell, at in cells(part))
        offset += part.size
    return found
