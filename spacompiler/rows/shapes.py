"""Axis primitives that regroup positions: views, permutations, replicas, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..axes.expressions import ONE, Expr, product
from ..axes.space import Clash
from ..graph.ir import Node
from .solver import Solver


def reshape(s: Solver, n: Node) -> None:
    """view/reshape: regroup runs of dimensions whose products agree."""
    out = n.outputs[0]
    made = regroup(s, s.dims[next(n.refs())], s.shape(out))
    s.put(out, made)
    sizes = n.arg(1, "size", n.kwargs.get("shape"))
    if isinstance(sizes, (list, tuple)):
        key = ("args", 1) if len(n.args) > 1 else ("kwargs", "size" if "size" in n.kwargs
                                                   else "shape")
        for i, e in enumerate(made):
            s.edit(n, (*key, i), e)


def regroup(s: Solver, dims: Sequence[Expr], shape: Sequence[int]) -> list[Expr]:
    """Flatten each minimal run of dimensions and factor it into the new sizes."""
    made: list[Expr] = []
    old, new = list(dims), list(shape)
    while new:
        size = new.pop(0)
        if size == 1:
            made.append(ONE)
            continue
        give, take = [size], [old.pop(0)]
        while (have := math.prod(e.size for e in take)) != (want := math.prod(give)):
            if have < want:
                take.append(old.pop(0))
            else:
                give.append(new.pop(0))
        made.extend(_unnest(s, product(take), give))
    return made


def _unnest(s: Solver, e: Expr, sizes: Sequence[int]) -> list[Expr]:
    made: list[Expr] = []
    for size in reversed(sizes[1:]):
        e, inner = s.space.factor(e, size)
        made.append(inner)
    return [e, *reversed(made)]


def reshape_as(s: Solver, n: Node) -> None:
    """reshape_as(x, other): regrouped to the sizes, and so tied to the axes, of another tensor."""
    x, other = n.args[0].name, n.args[1].name
    made = regroup(s, s.dims[x], s.shape(n.outputs[0]))
    for e, o in zip(made, s.dims[other], strict=True):
        s.relate(e, o, n)
    s.put(n.outputs[0], made)


def glu(s: Solver, n: Node) -> None:
    """glu(x, dim): one half gates the other, so both shrink alike."""
    dims = list(s.dims[next(n.refs())])
    dim = n.arg(1, "dim", -1) % len(dims)
    left, right = s.space.split(dims[dim], dims[dim].size // 2)
    s.relate(left, right, n)
    dims[dim] = left
    s.put(n.outputs[0], dims)


def im2col(s: Solver, n: Node) -> None:
    """im2col(x, kernel, ...): (b, c, h, w) -> (b, c x window, positions)."""
    dims = s.dims[next(n.refs())]
    s.freeze(dims[-2:], f"{n.op} works along it")
    *_, columns, places = s.shape(n.outputs[0])
    window = s.space.atom(columns // dims[-3].size, "position inside the operator's window")
    s.put(n.outputs[0], [*dims[:-3], product((dims[-3], window)),
                         s.space.atom(places, f"result of {n.op}")])


def col2im(s: Solver, n: Node) -> None:
    """col2im(x, size, kernel, ...): (b, c x window, positions) -> (b, c, h, w)."""
    dims = s.dims[next(n.refs())]
    channels, window = s.space.factor(dims[-2], n.args[2][0] * n.args[2][1])
    s.freeze([window, dims[-1]], f"{n.op} works along it")
    made = [s.space.atom(size, f"result of {n.op}") for size in s.shape(n.outputs[0])[-2:]]
    s.put(n.outputs[0], [*dims[:-2], channels, *made])


def windows(s: Solver, n: Node) -> None:
    """unfold(x, dim, size, step): windows along one dimension, their positions last."""
    made = list(s.dims[next(n.refs())])
    dim = n.args[1] % len(made)
    s.space.freeze(made[dim], f"{n.op} works along it")
    shape = s.shape(n.outputs[0])
    made[dim] = s.space.atom(shape[dim], f"result of {n.op}")
    s.put(n.outputs[0], [*made, s.space.atom(shape[-1], "position inside a window")])


def flatten(s: Solver, n: Node) -> None:
    """flatten(x, start, end): a run of dimensions as one."""
    s.put(n.outputs[0], regroup(s, s.dims[next(n.refs())], s.shape(n.outputs[0])))


def unflatten(s: Solver, n: Node) -> None:
    """unflatten(x, dim, sizes)."""
    made = regroup(s, s.dims[next(n.refs())], s.shape(n.outputs[0]))
    s.put(n.outputs[0], made)
    first = n.args[1] % len(s.dims[next(n.refs())])
    for i in range(len(n.args[2])):
        s.edit(n, ("args", 2, i), made[first + i])


def permute(s: Solver, n: Node) -> None:
    """permute(x, order); numpy_T turns the order around."""
    dims = s.dims[next(n.refs())]
    s.put(n.outputs[0], [dims[d] for d in n.arg(1, "dims", range(len(dims))[::-1])])


def movedim(s: Solver, n: Node) -> None:
    """movedim(x, source, destination)."""
    dims = s.dims[next(n.refs())]
    source, target = ([d % len(dims) for d in (a if isinstance(a, (list, tuple)) else [a])]
                      for a in n.args[1:])
    made = [e for d, e in enumerate(dims) if d not in source]
    for at, d in sorted(zip(target, source, strict=True)):
        made.insert(at, dims[d])
    s.put(n.outputs[0], made)


def transpose(s: Solver, n: Node) -> None:
    """transpose(x, a, b): two dimensions change places; t(x) the last two."""
    dims = list(s.dims[next(n.refs())])
    a, b = n.args[1:] or (-1, -2)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    s.put(n.outputs[0], dims)


def unsqueeze(s: Solver, n: Node) -> None:
    """unsqueeze(x, dim): a new dimension of size one."""
    dims = list(s.dims[next(n.refs())])
    dims.insert(n.args[1] % (len(dims) + 1), ONE)
    s.put(n.outputs[0], dims)


def squeeze(s: Solver, n: Node) -> None:
    """Drop dimensions of one: those named, or all."""
    dims = s.dims[next(n.refs())]
    named = n.arg(1, "dim", list(range(len(dims))))
    gone = {d % len(dims) for d in (named if isinstance(named, (list, tuple)) else [named])}
    s.put(n.outputs[0], [e for i, e in enumerate(dims) if i not in gone or e.size != 1])


def expand(s: Solver, n: Node) -> None:
    """expand(x, sizes): a stretched dimension is a new axis of replicas."""
    out, old = n.outputs[0], s.dims[next(n.refs())]
    shape = s.shape(out)
    padded = [ONE] * (len(shape) - len(old)) + list(old)
    made = [s.space.atom(size) if e.size != size else e
            for e, size in zip(padded, shape, strict=True)]
    s.put(out, made)
    sizes = n.arg(1, "size")
    for i, e in enumerate(made if isinstance(sizes, (list, tuple)) else ()):
        if sizes[i] != -1:
            s.edit(n, ("args", 1, i), e)


def tile(s: Solver, n: Node) -> None:
    """repeat / tile(x, counts): replicas outside each dimension."""
    old, counts = s.dims[next(n.refs())], n.args[1]
    padded = [ONE] * (len(counts) - len(old)) + list(old)
    made = padded[: len(padded) - len(counts)]
    for i, (e, count) in enumerate(zip(padded[len(made):], counts, strict=True)):
        replicas = s.space.atom(count)
        s.edit(n, ("args", 1, i), replicas)
        made.append(product((replicas, e)))
    s.put(n.outputs[0], made)


def repeat_interleave(s: Solver, n: Node) -> None:
    """repeat_interleave(x, count, dim): replicas inside a dimension."""
    dims = list(s.dims[next(n.refs())])
    count, dim = n.args[1], n.arg(2, "dim")
    if not isinstance(count, int) or dim is None:
        raise Clash("only one count along one dimension is understood")
    replicas = s.space.atom(count)
    s.edit(n, ("args", 1), replicas)
    dims[dim] = product((dims[dim], replicas))
    if n.kwargs.get("output_size") is not None:
        s.edit(n, ("kwargs", "output_size"), dims[dim])
    s.put(n.outputs[0], dims)
