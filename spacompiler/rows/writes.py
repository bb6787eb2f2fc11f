"""Axis primitives that put values into a part of a tensor: scatters, indexed writes.

What a write finds by number stays; all other dimensions of the tensor and of the values agree.
"""

from __future__ import annotations

from collections.abc import Callable

from ..axes.expressions import ONE, Expr, concat, is_frozen
from ..axes.space import Clash
from ..graph.ir import Node, Ref
from .cuts import cuts3, span
from .reductions import indexed
from .solver import Solver


def _agree(s: Solver, n: Node, x: tuple[Expr, ...], values: list[Expr], but: int) -> None:
    for d, (e, o) in enumerate(zip(x, values, strict=True)):
        if d != but:
            s.relate(e, o, n)


def _part(s: Solver, n: Node, dim: int, cut: Callable[[], Expr], values: list[Expr]) -> None:
    """The written part of one dimension is that of the values, if it can be cut out."""
    x = s.dims[n.args[0].name]
    try:
        s.space.unify(cut(), values[dim])
    except Clash:
        s.freeze([x[dim], values[dim]], f"{n.op} writes into it")
    _agree(s, n, x, values, dim)
    s.put(n.outputs[0], x)


def slice_scatter(s: Solver, n: Node) -> None:
    """slice_scatter(x, part, dim, start, end, step): x with a slice of it replaced.

    A part of every other position is smaller than what lies between the bounds: a clash.
    """
    x, part = (s.dims[a.name] for a in n.args[:2])
    dim = n.args[2] % len(x)
    start, end = span(n.arg(3, "start"), n.arg(4, "end"), x[dim].size)

    def cut() -> Expr:
        if is_frozen(x[dim]):
            s.freeze([part[dim]], f"{n.op} writes it into a dimension that stays")
            return part[dim]
        left, middle, _ = cuts3(s, x[dim], start, end)
        if start > 0:
            s.edit(n, ("args", 3), left, when=x[dim])
        if end < x[dim].size:
            s.edit(n, ("args", 4), concat((left, middle)) if start > 0 else middle, when=x[dim])
        return middle

    _part(s, n, dim, cut, list(part))


def select_scatter(s: Solver, n: Node) -> None:
    """select_scatter(x, part, dim, index): x with one position of a dimension replaced."""
    x, part = (s.dims[a.name] for a in n.args[:2])
    dim = n.args[2] % len(x)
    index = n.args[3] % x[dim].size

    def cut() -> Expr:
        if not is_frozen(x[dim]):
            left, _, _ = cuts3(s, x[dim], index, index + 1)
            s.edit(n, ("args", 3), left, when=x[dim], value=None if index else 0)
        return ONE

    _part(s, n, dim, cut, [*part[:dim], ONE, *part[dim:]])


def index_write(s: Solver, n: Node) -> None:
    """index_add, index_copy, index_fill(x, dim, index, values)."""
    x, index, values = s.dims[n.args[0].name], n.args[2].name, n.args[3]
    dim = n.args[1] % len(x)
    s.freeze([x[dim], *s.dims[index]], f"{n.op} writes into it")
    if isinstance(values, Ref) and len(s.dims[values.name]) == len(x):
        s.freeze([s.dims[values.name][dim]], f"{n.op} reads it by an index")
        _agree(s, n, x, list(s.dims[values.name]), dim)
    s.put(n.outputs[0], x)


def index_put(s: Solver, n: Node) -> None:
    """index_put(x, [i, None, j, ...], values): values broadcast to x[i, :, j, ...]."""
    made, values = indexed(s, n), s.dims[n.args[2].name]
    for e, o in zip(reversed(made), reversed(values), strict=False):
        if e is ONE:
            s.space.freeze(o, f"{n.op} writes it by a mask")
        elif o.size != 1:
            s.relate(e, o, n)
    s.put(n.outputs[0], s.dims[n.args[0].name])


def scatter(s: Solver, n: Node) -> None:
    """scatter(x, dim, index, values, ...): as gather, written back."""
    x, index = s.dims[n.args[0].name], s.dims[n.args[2].name]
    others = [s.dims[a.name] for a in n.args[3:] if isinstance(a, Ref) and s.dims[a.name]]
    dim = n.args[1] % len(x)
    chosen = s.label(n, n.args[2].name)
    for d, (e, at) in enumerate(zip(x, index, strict=True)):
        values = [dims[d] for dims in others]
        if d == dim and chosen is not None:
            s.freeze((at, *values), f"{n.title()} writes it by positions")
            s.relate(e, chosen, n)
        elif d == dim or e.size != at.size:
            s.freeze((e, at, *values), f"{n.title()} writes into it")
        else:
            for other in (at, *values):
                s.relate(e, other, n)
    s.put(n.outputs[0], x)
