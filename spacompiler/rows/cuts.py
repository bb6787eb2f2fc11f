"""Axis primitives that join and cut dimensions: cat, split, slices, strides, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..axes.expressions import ONE, Expr, concat, deal, is_frozen, product
from ..axes.space import Clash
from ..graph.idioms import base
from ..graph.ir import Node
from .findings import Path
from .primitives import broadcast
from .solver import Solver


def cat(s: Solver, n: Node) -> None:
    """cat(tensors, dim): a Sum along dim, equal elsewhere."""
    parts = [s.dims[ref.name] for ref in n.args[0] if s.shape(ref.name) != (0,)]
    made = list(parts[0])
    dim = n.arg(1, "dim", 0) % len(made)
    made[dim] = concat(dims[dim] for dims in parts)
    for dims in parts:
        for i, e in enumerate(dims):
            if i != dim:
                s.relate(made[i], e, n)
    s.put(n.outputs[0], made)


def stack(s: Solver, n: Node) -> None:
    """stack(tensors, dim): a new dimension whose positions are cut from each other."""
    parts = [s.dims[ref.name] for ref in n.args[0]]
    made = broadcast(s, n, parts)
    made.insert(n.arg(1, "dim", 0) % (len(made) + 1), concat([ONE] * len(parts)))
    s.put(n.outputs[0], made)


def cuts(s: Solver, e: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Cut an expression into consecutive pieces."""
    made: list[Expr] = []
    for size in sizes[:-1]:
        piece, e = s.space.split(e, size)
        made.append(piece)
    return [*made, e]


def split(s: Solver, n: Node) -> None:
    """split / split_with_sizes / chunk / unsafe_split: pieces along one dimension."""
    ref = next(n.refs())
    dim = n.arg(2, "dim", 0) % len(s.dims[ref])
    sizes = [s.shape(out)[dim] for out in n.outputs]
    pieces = cuts(s, s.dims[ref][dim], sizes)
    for out, piece in zip(n.outputs, pieces, strict=True):
        s.put(out, [piece if i == dim else e for i, e in enumerate(s.dims[ref])])
    given = n.arg(1, "split_size")
    if isinstance(given, (list, tuple)):
        for i, piece in enumerate(pieces):
            s.edit(n, ("args", 1, i), piece)
        return
    if not base(n.op).endswith("chunk"):
        s.edit(n, ("args", 1), pieces[0])
    for piece in pieces:
        if piece.size == pieces[0].size:
            s.relate(pieces[0], piece, n)
        else:
            s.freeze(pieces, f"{n.op} leaves a smaller last piece")


def unbind(s: Solver, n: Node) -> None:
    """unbind(x, dim): each position along dim as a result of its own, so all of them stay apart."""
    ref = next(n.refs())
    dims = list(s.dims[ref])
    dim = n.arg(1, "dim", 0) % len(dims)
    cuts(s, dims[dim], [1] * dims[dim].size)
    for out in n.outputs:
        s.put(out, dims[:dim] + dims[dim + 1 :])


def select(s: Solver, n: Node) -> None:
    """select(x, dim, index): that slice must stay, so the dimension is cut around it."""
    dims = list(s.dims[next(n.refs())])
    dim = n.args[1] % len(dims)
    size = dims[dim].size
    index = n.args[2] % size
    if not is_frozen(dims[dim]):
        left, _, _ = cuts3(s, dims[dim], index, index + 1)
        s.edit(n, ("args", 2), left, when=dims[dim], value=None if index else 0)
    s.put(n.outputs[0], dims[:dim] + dims[dim + 1 :])


def cuts3(s: Solver, e: Expr, start: int, end: int) -> tuple[Expr, Expr, Expr]:
    """Cut e = left + middle + right; an empty side is ONE."""
    left: Expr = ONE
    right: Expr = ONE
    if end < e.size:
        e, right = s.space.split(e, end)
    if start > 0:
        left, e = s.space.split(e, start)
    return left, e, right


def slice_(s: Solver, n: Node) -> None:
    """slice(x, dim, start, end, step): positions that are no equal runs are picked by number."""
    dims = list(s.dims[next(n.refs())])
    bounds = (n.arg(2, "start"), n.arg(3, "end"), n.arg(4, "step", 1))
    dim = n.args[1] % len(dims)
    size, step = dims[dim].size, bounds[2]
    positions = np.arange(size)[slice(*bounds)]
    if s.rewire and step > 1 and len(positions) and len(positions) * step != size:
        s.gather(n, next(n.refs()), dim, positions)
        return
    cut_dim(s, n, dims, dim, bounds, (("args", 2), ("args", 3)))
    s.put(n.outputs[0], dims)


def cut_dim(s: Solver, n: Node, dims: list[Expr], dim: int,
            bounds: tuple[int | None, int | None, int], paths: tuple[Path, Path]) -> None:
    """Cut one of `dims` in place by (start, end, step); `paths` say where start and end stand."""
    size, step = dims[dim].size, bounds[2]
    if step == -1:
        s.space.freeze(dims[dim], f"{n.op} turns it around")  # all of it: a part has another size
        return
    start, end = span(bounds[0], bounds[1], size)
    if step != 1:
        dims[dim] = _strided(s, dims[dim], start, end, step)
        return
    left, middle, _ = cuts3(s, dims[dim], start, end)
    if start > 0:
        s.edit(n, paths[0], left, when=dims[dim])
    if end < size:
        upto = concat((left, middle)) if start > 0 else middle
        s.edit(n, paths[1], upto, when=dims[dim])
    dims[dim] = middle


def narrow(s: Solver, n: Node) -> None:
    """narrow(x, dim, start, length)."""
    dims = list(s.dims[next(n.refs())])
    dim, (start, length) = n.args[1] % len(dims), n.args[2:]
    start %= dims[dim].size
    left, middle, _ = cuts3(s, dims[dim], start, start + length)
    s.edit(n, ("args", 2), left, when=dims[dim], value=None if start else 0)
    s.edit(n, ("args", 3), middle)
    dims[dim] = middle
    s.put(n.outputs[0], dims)


def as_strided(s: Solver, n: Node) -> None:
    """as_strided(x, sizes, strides): dimensions at both ends that keep their size and stride are
    carried, the others freeze (chunks that overlap along a sequence)."""
    if n.arg(3, "storage_offset"):
        raise Clash("it starts inside of its data")
    dims, sizes, strides = s.dims[next(n.refs())], list(n.args[1]), list(n.args[2])
    reach = sum((k - 1) * step for k, step in zip(sizes, strides, strict=True))
    if reach >= math.prod(e.size for e in dims):
        raise Clash("it reaches beyond its data")
    steps = [math.prod(e.size for e in dims[d + 1:]) for d in range(len(dims))]
    first, last = _carried([(e.size, step) for e, step in zip(dims, steps, strict=True)],
                           list(zip(sizes, strides, strict=True)))
    s.freeze(dims[first:len(dims) - last], f"{n.op} goes over it by strides")
    made = [s.space.atom(k, f"result of {n.op}") for k in s.shape(n.outputs[0])]
    made[:first], made[len(made) - last:] = dims[:first], dims[len(dims) - last:]
    inner = product(dims[len(dims) - last:])
    for d in (*range(first), *range(len(made) - last, len(made))):
        s.edit(n, ("args", 1, d), made[d])
    for d in range(len(made) - last):
        outer = s.space.atom(strides[d] // inner.size, "a stride")
        s.edit(n, ("args", 2, d), product((outer, inner)))
    for d in range(len(made) - last, len(made)):
        s.edit(n, ("args", 2, d), product(dims[len(dims) - len(made) + d + 1:]))
    s.put(n.outputs[0], made)


def _carried(source: list[tuple[int, int]], target: list[tuple[int, int]]) -> tuple[int, int]:
    """How many (size, stride) agree at the start, and at the end (where strides go over them).

    Nothing reaches from one of the first positions into the next: the last would reach beyond.
    """
    most = min(len(source), len(target))
    last = next((k for k in range(most) if source[~k] != target[~k]), most)
    inner = math.prod(size for size, _ in source[len(source) - last:])
    if any(step % inner for _, step in target[:len(target) - last]):
        last = 0
    return next((k for k in range(most - last) if source[k] != target[k]), most - last), last


def _clamp(value: int | None, size: int) -> int:
    value = (0 if value is None else value)
    return max(0, min(value + size if value < 0 else value, size))


def span(start: int | None, end: int | None, size: int) -> tuple[int, int]:
    """Return the first position of a slice, and the one after its last."""
    return _clamp(start, size), size if end is None else _clamp(end, size)


def _strided(s: Solver, e: Expr, start: int, end: int, step: int) -> Expr:
    """x[start::step] picks one member of each run of `step`: runs go or stay whole."""
    if len(range(start, end, step)) * step != e.size:
        raise Clash("a strided slice that is not one member of equal runs")
    outer, inner = s.space.factor(e, step)
    cuts(s, inner, [1] * step)
    return outer


def flip(s: Solver, n: Node) -> None:
    """flip(x, dims): positions in reversed order."""
    dims = list(s.dims[next(n.refs())])
    for d in n.args[1]:
        dims[d] = deal(dims[d], np.arange(dims[d].size)[::-1])
    s.put(n.outputs[0], dims)


def roll(s: Solver, n: Node) -> None:
    """roll(x, shifts, dims): the last `shift` positions come to the front."""
    dims = list(s.dims[next(n.refs())])
    shifts, along = n.args[1], n.arg(2, "dims", [])
    if not along:
        s.freeze(dims, f"{n.op} moves positions from row to row")
    for i, (shift, d) in enumerate(zip(shifts, along, strict=False)):
        if not shift % dims[d].size:
            s.edit(n, ("args", 1, i), dims[d], value=0)
        elif not is_frozen(dims[d]):
            left, right = s.space.split(dims[d], dims[d].size - shift % dims[d].size)
            s.edit(n, ("args", 1, i), right, when=dims[d])
            dims[d] = concat((right, left))
    s.put(n.outputs[0], dims)


def pad(s: Solver, n: Node) -> None:
    """pad(x, pads, mode, value): constant padding is a fixed part of a Sum.

    Other modes copy positions into the padding, so that the padded dimensions freeze.
    """
    dims = list(s.dims[next(n.refs())])
    pads = n.args[1]
    copied = isinstance(n.arg(2, "mode"), str) and n.arg(2, "mode") != "constant"
    for i in range(len(pads) // 2):
        dim, before, after = len(dims) - 1 - i, pads[2 * i], pads[2 * i + 1]
        if copied:
            s.space.freeze(dims[dim], f"{n.op} copies positions of it")
        if before < 0 or after < 0:
            s.space.freeze(dims[dim], f"{n.op} crops it")
            dims[dim] = s.space.atom(s.shape(n.outputs[0])[dim], f"{n.op} crops it")
            continue
        parts = [s.space.atom(k, "padding") for k in (before,) if k] + [dims[dim]]
        parts += [s.space.atom(k, "padding") for k in (after,) if k]
        dims[dim] = concat(parts)
    s.put(n.outputs[0], dims)
