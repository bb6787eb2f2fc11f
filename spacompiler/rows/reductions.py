"""Axis primitives that mix or look up positions: reductions, norms, indexing, windows."""

from __future__ import annotations

from collections.abc import Iterable

from ..axes.expressions import ONE, Expr, is_frozen
from ..axes.space import Clash
from ..graph.ir import Node, Ref
from .primitives import broadcast, operands, pointwise, relate_pattern, works_along
from .solver import Row, Solver


def _reduced(s: Solver, n: Node, argument: int) -> tuple[str, list[int]]:
    ref = next(n.refs())
    rank = len(s.dims[ref])
    dims = n.arg(argument, "dim")
    if isinstance(dims, bool):  # var and std over everything: it says whether they are unbiased
        dims = None
    named = list(range(rank)) if dims is None or dims == [] else dims
    named = named if isinstance(named, (list, tuple)) else [named]
    return ref, [d % rank for d in named]


def reduce(how: str, argument: int = 1) -> Row:
    """A reduction over the dimensions that an argument names.

    `sum` reads them (zeros add nothing: so do norms, any, count_nonzero), `mean` does as part of
    an RMSNorm. Any other reduction, or mean on its own, freezes what it reduces.
    """

    def row(s: Solver, n: Node) -> None:
        ref, named = _reduced(s, n, argument)
        keep = any(len(s.shape(out)) == len(s.dims[ref]) for out in n.outputs)
        for d in named:
            e = s.dims[ref][d]
            if how == "sum":
                s.read(n, ref, d, "sum")
            elif how == "mean" and n.name in s.norms:
                s.read(n, ref, d, "norm")
                if s.norms[n.name].power < 1:
                    s.roles.append((e, "normalised"))
            else:
                s.space.freeze(e, f"{n.op} over it depends on how many slices there are")
        made = [ONE if i in named else e for i, e in enumerate(s.dims[ref])
                if keep or i not in named]
        for out in n.outputs:
            s.put(out, made)

    return row


def vector_norm(s: Solver, n: Node) -> None:
    """norm(x, order, dims): zeros add nothing to it if its order is positive."""
    order = n.arg(1, "ord", n.kwargs.get("p", 2))
    neutral = order is None or (isinstance(order, (int, float)) and order >= 0)
    reduce("sum" if neutral else "other", 2)(s, n)


def extremum(s: Solver, n: Node) -> None:
    """max / min: of two tensors, or over a dimension."""
    (pointwise if isinstance(n.arg(1, "other"), Ref) else reduce("other"))(s, n)


SCORES = "of scores, what is gone would have to be minus infinity, not zero"


def along(argument: int = 1, keyword: str = "dim", default: int | list[int] | None = -1,
          why: str = "") -> Row:
    """An operator that mixes all positions of one dimension (softmax, cumsum, sort).

    With `default=None` it mixes all dimensions unless some are named. `why` tells the user more.
    """

    def row(s: Solver, n: Node) -> None:
        given = n.arg(argument, keyword, default)
        if default is None and not given and given != 0:
            given = range(len(s.dims[next(n.refs())]))
        _mixed(s, n, given if isinstance(given, (list, tuple, range)) else [given], why)

    return row


def triangle(s: Solver, n: Node) -> None:
    """tril / triu: which positions stay depends on both of the last two dimensions."""
    _mixed(s, n, (-1, -2))


def _mixed(s: Solver, n: Node, along: Iterable[int], why: str = "") -> None:
    dims = s.dims[next(n.refs())]
    for d in along:
        s.space.freeze(dims[d], works_along(n, why))
    for out in n.outputs:
        shape = s.shape(out)
        s.put(out, [e if e.size == shape[i] else s.space.atom(shape[i], f"result of {n.op}")
                    for i, e in enumerate(dims)])


def layer_norm(s: Solver, n: Node) -> None:
    """layer_norm(x, shape, gain, bias, eps): its statistics change with the width."""
    x = n.args[0].name
    width = len(n.args[1])
    dims = s.dims[x]
    for ref in filter(None, operands(n)[2:]):
        for e, other in zip(dims[-width:], s.dims[ref], strict=True):
            s.relate(e, other, n)
    for i, e in enumerate(dims[-width:], start=len(dims) - width):
        s.read(n, x, i, "norm")
        s.roles.append((e, "normalised"))
        s.approximate.append((e, f"statistics of {n.title()} change with the width"))
        s.edit(n, ("args", 1, i - len(dims) + width), e)
    if width > 1:
        s.freeze(dims[-width:], f"{n.op} takes its statistics over several dimensions")
    s.put(n.outputs[0], dims)


def rms_norm(s: Solver, n: Node) -> None:
    """aten.rms_norm(x, shape, gain, eps): exact once gain and eps are corrected; without a gain
    its statistics change with the width."""
    x = n.args[0].name
    e = s.dims[x][-1]
    for ref in filter(None, operands(n)[2:]):
        for i, other in enumerate(reversed(s.dims[ref])):
            s.relate(s.dims[x][-1 - i], other, n)
    alone = len(n.args[1]) == 1 and len(n.args) > 2 and n.args[2] is None
    if n.name in s.norms or alone:
        s.read(n, x, -1, "norm")
        s.roles.append((e, "normalised"))
        s.edit(n, ("args", 1, 0), e)
    else:
        s.freeze(s.dims[x][-len(n.args[1]):], f"{n.op} has no gain and eps to correct")
    if alone:
        s.approximate.append((e, f"statistics of {n.title()} change with the width"))
    s.put(n.outputs[0], s.dims[x])


def weight_norm(s: Solver, n: Node) -> None:
    """_weight_norm(v, g, dim): v / |v| * g; the norm is over all dimensions but `dim`."""
    v, g = s.dims[n.args[0].name], s.dims[n.args[1].name]
    dim = n.arg(2, "dim", 0) % len(v)
    s.freeze([e for d, e in enumerate(v) if d != dim], f"{n.op} takes a norm over it")
    s.relate(v[dim], g[dim % len(g)], n)
    s.put(n.outputs[0], v)


def group_norm(s: Solver, n: Node) -> None:
    """group_norm(x, groups, gain, bias): whole groups may go; what goes from inside a group
    changes its statistics."""
    inside = norm_groups(s, n)
    if not is_frozen(inside):
        s.read(n, n.args[0].name, 1, "norm")
        s.approximate.append((inside, f"statistics of {n.title()} are taken over a group"))


def norm_groups(s: Solver, n: Node) -> Expr:
    """Relate the operands of group_norm(x, groups, gain, bias); returns the inside of a group."""
    refs = [n.args[0].name, *operands(n)[2:]]
    relate_pattern(s, n, "b (g i) !*, (g i), (g i) -> b (g i) !*", refs,
                   sizes={"g": (1, "num_groups")})
    channels = s.dims[n.args[0].name][1]
    return s.space.factor(channels, channels.size // n.args[1])[1]


def index(s: Solver, n: Node) -> None:
    """x[i, j, ...] by integer tensors or a mask: indexed dimensions freeze, others carry over.

    One that is indexed by chosen positions lies along the axis they were chosen from.
    """
    s.put(n.outputs[0], indexed(s, n, s.shape(n.outputs[0])))


def indexed(s: Solver, n: Node, shape: tuple[int, ...] = ()) -> list[Expr]:
    """Return the dimensions of x[i, j, ...]; `shape` says how many positions a mask picks."""
    dims, d = list(s.dims[n.args[0].name]), 0
    at: list[int] = []
    chosen: dict[int, Expr] = {}
    refs: list[tuple[str, bool]] = []
    for ref in n.args[1]:
        mask = isinstance(ref, Ref) and s.graph.tensors[ref.name].dtype == "bool"
        count = len(s.dims[ref.name]) if mask else 1
        if isinstance(ref, Ref):
            at += range(d, d + count)
            refs.append((ref.name, mask))
            s.freeze(s.dims[ref.name], "an index")
            if (axis := s.label(n, ref.name)) is not None:
                chosen[d] = axis
        d += count
    for d in at:
        if d in chosen:
            choose(s, n, n.args[0].name, d, chosen[d])
        else:
            s.space.freeze(dims[d], f"indexed by data in {n.title()}")
    together = at == list(range(at[0], at[-1] + 1))
    where = at[0] if together else 0
    if any(mask for _, mask in refs):
        if len(refs) > 1:
            raise Clash("indexed by a mask and more")
        block = [s.space.atom(shape[where] if shape else 1, "positions of a mask")]
    else:
        block = broadcast(s, n, [s.dims[name] for name, _ in refs])
    rest = [e for d, e in enumerate(dims) if d not in at]
    return rest[:where] + block + rest[where:]


def choose(s: Solver, n: Node, ref: str, dim: int, axis: Expr) -> None:
    """A dimension that is read at positions chosen along `axis` lies along it."""
    s.relate(s.dims[ref][dim], axis, n)
    s.read(n, ref, dim, "chosen")


def index_select(s: Solver, n: Node) -> None:
    """index_select(x, dim, index): what is looked up in freezes, the others carry over."""
    dims, index = list(s.dims[n.args[0].name]), s.dims[n.args[2].name]
    dim = n.args[1] % len(dims)
    s.space.freeze(dims[dim], f"looked up by {n.title()}")
    s.freeze(index, "an index")
    dims[dim] = s.space.atom(s.shape(n.outputs[0])[dim], "an index")
    s.put(n.outputs[0], dims)


def gather(s: Solver, n: Node) -> None:
    """gather(x, dim, index): freezes what it looks up; elsewhere x and index go together."""
    x, index = n.args[0].name, n.args[2].name
    dim, made = n.args[1] % len(s.dims[x]), []
    chosen = s.label(n, index)
    for d, (e, at) in enumerate(zip(s.dims[x], s.dims[index], strict=True)):
        if d == dim and chosen is not None:
            choose(s, n, x, d, chosen)
        elif d == dim or e.size != at.size:
            s.freeze((e, at), f"looked up by {n.title()}")
        else:
            s.relate(e, at, n)
        made.append(at)
    s.put(n.outputs[0], made)


def create(argument: int) -> Row:
    """zeros, ones, full: any slice of a constant may go; the argument holds its sizes."""

    def row(s: Solver, n: Node) -> None:
        made = [s.space.atom(size) for size in s.shape(n.outputs[0])]
        for i, e in enumerate(made):
            s.edit(n, ("args", argument, i), e)
        s.put(n.outputs[0], made)

    return row


def first_dims(count: int) -> Row:
    """Keep the first `count` dimensions, freeze the others (pooling, interpolation)."""

    def row(s: Solver, n: Node) -> None:
        dims = s.dims[next(n.refs())]
        s.freeze(dims[count:], f"{n.op} works along it")
        for out in n.outputs:
            shape = s.shape(out)
            tail = [s.space.atom(k, f"result of {n.op}") for k in shape[count:]]
            s.put(out, [*dims[:count], *tail])

    return row


def last_frozen(count: int) -> Row:
    """Keep all but the last `count` dimensions (pooling without a batch dimension)."""

    def row(s: Solver, n: Node) -> None:
        first_dims(len(s.dims[next(n.refs())]) - count)(s, n)

    return row
