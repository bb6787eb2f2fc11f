"""The space of a network's axes, refined by unification.

Operators relate dimensions only through `split`, `carve`, `factor`, `unify` and `freeze`. What
cannot be solved freezes: never wrong, at worst not prunable.

>>> space = Space()
>>> rows = space.atom(12)                      # a Linear's output ...
>>> heads, dims = space.factor(rows, 4)        # ... viewed as (3, 4)
>>> left, right = space.split(dims, 2)         # ... whose halves are rotated against each other
>>> space.unify(left, right)
>>> show(rows)
'3*(2+2)'
>>> len(set(walk(rows)))
2
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod

import numpy as np

from .expressions import (
    ONE,
    Array,
    Atom,
    Expr,
    Prod,
    Sum,
    cells,
    concat,
    deal,
    is_frozen,
    mentions,
    product,
    reasons,
    resolve,
    show,
    walk,
)

REASONS = 8
"""An atom keeps the first few reasons why it is frozen: an axis that runs through a whole network
would gather one from each operator."""


class Clash(Exception):
    """Two structures have no common refinement; callers freeze both sides with this text."""


class Space:
    """The solver's state: makes atoms and refines them in place."""

    def __init__(self) -> None:
        self._serial = itertools.count()
        self.clashes: list[str] = []

    def atom(self, size: int, *why: str) -> Expr:
        """Make a fresh dimension of `size` slices, frozen if a reason is given."""
        return ONE if size == 1 else Atom(size, next(self._serial), why)

    def freeze(self, e: Expr, why: str) -> None:
        """Forbid the removal of any slice of `e`, keeping the reason for the user."""
        for atom in (e,) if isinstance(e, Atom) and e.bound is None else walk(e):
            if len(atom.reasons) < REASONS and why not in atom.reasons:
                atom.reasons = (*atom.reasons, why)

    def bind(self, atom: Atom, e: Expr) -> None:
        """Give an atom its refinement, a normal form, or tie it to another atom.

        Raises Clash if the atom is in it.
        """
        if e is atom:
            return
        if isinstance(e, Atom):
            keep, drop = (e, atom) if e.serial < atom.serial else (atom, e)
            if drop.reasons:
                keep.reasons = tuple(dict.fromkeys(keep.reasons + drop.reasons))[:REASONS]
            drop.bound = keep
            return
        if isinstance(e, Sum) and e.order is not None and e.parts == (atom,):
            e = self._cycles(e.order)
        if atom in mentions(e):
            raise Clash(f"an axis of {atom.size} would contain itself")
        for why in atom.reasons:
            self.freeze(e, why)
        atom.bound = e

    def _cycles(self, order: Array) -> Expr:
        """The dimension that a permutation maps to itself: slices of one cycle go together."""
        first, ahead = np.arange(len(order)), order
        for _ in range(len(order).bit_length()):  # the least slice among so many steps: doubled
            first, ahead = np.minimum(first, first[ahead]), ahead[ahead]
        _, index, lengths = np.unique(first, return_inverse=True, return_counts=True)
        parts: list[Expr] = []
        slots = np.empty(len(order), dtype=int)
        offset = 0
        for length in np.unique(lengths):
            cycles = np.flatnonzero(lengths == length)
            atom = self.atom(len(cycles))
            members = np.stack([np.flatnonzero(index == c) for c in cycles], axis=1)
            for row in members:
                slots[row] = offset + np.arange(len(cycles))
                parts.append(atom)
                offset += len(cycles)
        return deal(Sum(tuple(parts), len(order)), slots)

    def factor(self, e: Expr, k: int) -> tuple[Expr, Expr]:
        """Split `e = outer x inner` with `inner` of size k; raises Clash if impossible."""
        e = resolve(e)
        if k == 1:
            return e, ONE
        if k == e.size:
            return ONE, e
        if e.size % k:
            raise Clash(f"{show(e)} does not factor by {k}")
        if isinstance(e, Atom):
            outer, inner = self.atom(e.size // k, *e.reasons), self.atom(k, *e.reasons)
            e.bound = product((outer, inner))
            return outer, inner
        if is_frozen(e) and walk(e):
            why = reasons(e)
            return self.atom(e.size // k, *why), self.atom(k, *why)
        if isinstance(e, Sum) and e.order is not None:
            outer, inner = self.atom(e.size // k), self.atom(k)
            self.unify(e, product((outer, inner)))
            return outer, inner
        return self._factor_sum(e, k) if isinstance(e, Sum) else self._factor_prod(e, k)

    def _factor_sum(self, e: Sum, k: int) -> tuple[Expr, Expr]:
        """Factor term by term and unify the inner parts; short terms join into rows of k."""
        pairs: list[tuple[Expr, Expr]] = []
        run: list[Expr] = []
        for part in e.parts:
            run.append(part)
            if sum(p.size for p in run) % k == 0:
                pairs.extend([self.factor(part, k)] if len(run) == 1 else self._rows(run, k))
                run = []
        for _, inner in pairs:
            self.unify(pairs[0][1], inner)
        return concat(outer for outer, _ in pairs), pairs[0][1]

    def _rows(self, run: Sequence[Expr], k: int) -> Iterator[tuple[Expr, Expr]]:
        rest = concat(run)
        while rest.size > k:
            row, rest = self.split(rest, k)
            yield ONE, row
        yield ONE, rest

    def _factor_prod(self, e: Prod, k: int) -> tuple[Expr, Expr]:
        size = 1
        for i in reversed(range(len(e.parts))):
            part = e.parts[i]
            if k % (size * part.size) == 0:
                size *= part.size
                if size == k:
                    return product(e.parts[:i]), product(e.parts[i:])
                continue
            if part.size % (k // size):
                break
            outer, inner = self.factor(part, k // size)
            return product((*e.parts[:i], outer)), product((inner, *e.parts[i + 1 :]))
        fused = self._fused(e)
        if len(fused.parts) < len(e.parts):
            return self._factor_prod(fused, k)
        raise Clash(f"{show(e)} does not factor by {k}")

    def _fused(self, e: Prod) -> Prod:
        """Neighbours that are frozen whole as one: where they were cut does not matter."""
        parts: list[Expr] = []
        for frozen, run in itertools.groupby(e.parts, is_frozen):
            group = list(run)
            why = dict.fromkeys(w for part in group for w in reasons(part))
            parts += [self.atom(prod(p.size for p in group), *why)] if frozen else group
        return Prod(tuple(parts), e.size)

    def split(self, e: Expr, p: int) -> tuple[Expr, Expr]:
        """Cut `e = left(p) + right`, 0 < p < size; raises Clash if the cut has no solution."""
        e = resolve(e)
        if not 0 < p < e.size:
            raise Clash(f"a cut at {p} lies outside {show(e)}")
        if isinstance(e, Atom):
            left, right = self.atom(p, *e.reasons), self.atom(e.size - p, *e.reasons)
            e.bound = concat((left, right))
            return left, right
        if is_frozen(e) and walk(e):
            why = reasons(e)
            return self.atom(p, *why), self.atom(e.size - p, *why)
        if isinstance(e, Sum):
            if e.order is not None:
                return self.carve(e, np.arange(p)), self.carve(e, np.arange(p, e.size))
            return self._split_sum(e, p)
        inner = prod(part.size for part in e.parts[1:])
        if p % inner:
            raise Clash(f"a cut at {p} falls inside the product {show(e)}")
        left, right = self.split(e.parts[0], p // inner)
        return product((left, *e.parts[1:])), product((right, *e.parts[1:]))

    def _split_sum(self, e: Sum, p: int) -> tuple[Expr, Expr]:
        offset = 0
        for i, part in enumerate(e.parts):
            if p == offset:
                return concat(e.parts[:i]), concat(e.parts[i:])
            if p < offset + part.size:
                left, right = self.split(part, p - offset)
                return concat((*e.parts[:i], left)), concat((right, *e.parts[i + 1 :]))
            offset += part.size
        raise Clash(f"a cut at {p} lies outside {show(e)}")

    def unify(self, a: Expr, b: Expr) -> None:
        """Make two dimensions equal, slice by slice; raises Clash if that has no solution."""
        a = a if isinstance(a, Atom) and a.bound is None else resolve(a)
        b = b if isinstance(b, Atom) and b.bound is None else resolve(b)
        if a is b:
            return
        if a.size != b.size:
            raise Clash(f"sizes differ: {show(a)} and {show(b)}")
        if isinstance(a, Atom):
            self.bind(a, b)
        elif isinstance(b, Atom):
            self.bind(b, a)
        elif is_frozen(a) or is_frozen(b):
            self._freeze_with(a, b)
        elif isinstance(a, Sum) or isinstance(b, Sum):
            total, other = (a, b) if isinstance(a, Sum) else (b, a)
            self._unify_sum(total, other)  # type: ignore[arg-type]
        else:
            self._unify_prod(a, b)

    def _freeze_with(self, a: Expr, b: Expr) -> None:
        for one, other in ((a, b), (b, a)):
            if is_frozen(one):
                for why in reasons(one):
                    self.freeze(other, why)

    def carve(self, e: Expr, positions: Array) -> Expr:
        """Return the dimension made of these positions of `e`, in this order.

        `e` is refined so that each of its cells lies inside or outside; raises Clash if a product
        cannot be cut so.
        """
        if is_frozen(e) and walk(e):
            return self.atom(len(positions), *reasons(e))
        inside = np.zeros(resolve(e).size, dtype=bool)
        inside[positions] = True
        self._divide(e, inside)
        slot = np.full(len(inside), -1)
        chosen: list[Expr] = []
        offset = 0
        for cell, at in cells(e):
            if inside[at[0]]:
                slot[at] = offset + np.arange(len(at))
                chosen.append(cell)
                offset += len(at)
        return deal(Sum(tuple(chosen), offset), slot[positions])

    def _divide(self, e: Expr, inside: Array) -> None:
        """Cut atoms until each cell of `e` lies inside or outside."""
        while cut := [c for c in cells(e) if 0 < inside[c[1]].sum() < len(c[1])]:
            cell, at = cut[0]
            parts = cell.parts if isinstance(cell, Prod) else (cell,)
            grid = inside[at].reshape([part.size for part in parts])
            lines = [_along(grid, axis) for axis in range(len(parts))]
            axis = next((i for i, line in enumerate(lines) if line is not None), None)
            if axis is None:
                raise Clash(f"a cut falls inside the product {show(cell)}")
            self._cut_atom(parts[axis], lines[axis])

    def _cut_atom(self, atom: Expr, inside: Array | None) -> None:
        """Bind an atom to its slices inside and those outside, dealt out as they were."""
        assert isinstance(atom, Atom) and inside is not None
        count = int(inside.sum())
        parts = (self.atom(count, *atom.reasons), self.atom(atom.size - count, *atom.reasons))
        order = np.where(inside, np.cumsum(inside) - 1, count + np.cumsum(~inside) - 1)
        atom.bound = deal(Sum(parts, atom.size), order)

    def _unify_dealt(self, total: Sum, other: Expr) -> None:
        """Unify cell by cell: each takes from `other` the positions that it holds."""
        own = cells(total)
        if len(own) == 1 and len(cells(other)) == 1:
            ((cell, at),) = own
            if not isinstance(cell, Atom):
                raise Clash(f"{show(total)} and {show(other)} nest differently")
            self.bind(cell, resolve(self.carve(other, at)))
            return
        for cell, at in own:
            self.unify(cell, self.carve(other, at))

    def _unify_sum(self, total: Sum, other: Expr) -> None:
        if total.order is not None or (isinstance(other, Sum) and other.order is not None):
            self._unify_dealt(total, other)
            return
        rest = other
        for head in total.parts[:-1]:
            left, rest = self.split(rest, head.size)
            self.unify(head, left)
        self.unify(total.parts[-1], rest)

    def _unify_prod(self, a: Prod, b: Prod) -> None:
        small, large = a.parts[-1], b.parts[-1]
        k = min(small.size, large.size)
        (outer_a, inner_a), (outer_b, inner_b) = self.factor(a, k), self.factor(b, k)
        self.unify(inner_a, inner_b)
        self.unify(outer_a, outer_b)

    def relate(self, a: Expr, b: Expr, where: object = "") -> None:
        """`unify`, or freeze both sides where there is no solution; `where` names the place."""
        try:
            self.unify(a, b)
        except Clash as clash:
            why = f"{where}: {clash}" if where else str(clash)
            self.clashes.append(why)
            self.freeze(a, why)
            self.freeze(b, why)


def _along(grid: Array, axis: int) -> Array | None:
    """The mask along one axis, if the grid does not depend on the others."""
    line = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
    return line[:, 0] if (line == line[:, :1]).all() else None
