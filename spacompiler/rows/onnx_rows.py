"""Rows for operators that only ONNX has, or whose arguments only ONNX arranges so."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..axes.expressions import ONE, Expr, is_frozen, product
from ..axes.space import Clash
from ..graph.ir import Node, Ref
from . import cuts as cut
from . import primitives as p
from . import reductions as r
from .findings import Contraction
from .solver import Row, Solver


def name(n: Node, index: int) -> str | None:
    """Return the tensor at a position, None where it is absent or a plain value."""
    value = n.arg(index, "")
    return value.name if isinstance(value, Ref) else None


def gemm(s: Solver, n: Node) -> None:
    """Gemm(a, b, c, transA, transB, ...): c broadcasts to the product."""
    a, b = ("i n" if n.args[3] else "n i"), ("o i" if n.args[4] else "i o")
    p.relate_pattern(s, n, f"{a}, {b} -> n o", p.operands(n)[:2])
    _plus(s, n, 2)


def _plus(s: Solver, n: Node, index: int) -> None:
    other = name(n, index)
    if other is not None:
        s.put(n.outputs[0], p.broadcast(s, n, [s.dims[n.outputs[0]], s.dims[other]]))


def fused_matmul(s: Solver, n: Node) -> None:
    """FusedMatMul(a, b, transA, transB, bias): the last two dimensions may be swapped."""
    a, b = (list(s.dims[x.name]) for x in n.args[:2])
    left, right = ("... k n" if n.args[2] else "... n k"), ("... m k" if n.args[3] else "... k m")
    if min(len(a), len(b)) < 2:
        raise Clash("a product with a vector")
    p.relate_pattern(s, n, f"{left}, {right} -> ... n m", p.operands(n)[:2])
    _plus(s, n, 4)


def fused_conv(s: Solver, n: Node) -> None:
    """FusedConv(x, w, b, group, z): a convolution, z added to its result."""
    made = Node(n.name, n.op, (*n.args[:3], None, None, None, n.args[3]), {}, n.outputs)
    p.convolution(s, made)
    if s.edits and s.edits[-1].node == n.name:
        last = s.edits.pop()
        s.edit(n, ("args", 3), last.expr)
    _plus(s, n, 4)


def slice_(s: Solver, n: Node) -> None:
    """Slice(x, starts, ends, axes, steps)."""
    x, starts, ends = n.args[0].name, n.args[1], n.args[2]
    dims = list(s.dims[x])
    axes = n.arg(3, "axes") or list(range(len(starts)))
    steps = n.arg(4, "steps") or [1] * len(starts)
    for i, axis in enumerate(axes):
        cut.cut_dim(s, n, dims, axis % len(dims), (starts[i], ends[i], steps[i]),
                   (("args", 1, i), ("args", 2, i)))
    s.put(n.outputs[0], dims)


def unsqueeze(s: Solver, n: Node) -> None:
    """Unsqueeze(x, axes): axes count in the result."""
    dims = list(s.dims[n.args[0].name])
    rank = len(dims) + len(n.args[1])
    for d in sorted(a % rank for a in n.args[1]):
        dims.insert(d, ONE)
    s.put(n.outputs[0], dims)


def expand(s: Solver, n: Node) -> None:
    """Expand(x, sizes): broadcast both ways; a stretched dimension is an axis of replicas."""
    out, old, sizes = n.outputs[0], s.dims[n.args[0].name], n.args[1]
    shape = s.shape(out)
    padded = [ONE] * (len(shape) - len(old)) + list(old)
    made = [s.space.atom(size) if e.size != size else e
            for e, size in zip(padded, shape, strict=True)]
    for i, e in enumerate(made[len(made) - len(sizes):]):
        if sizes[i] != 1:
            s.edit(n, ("args", 1, i), e)
    s.put(out, made)


def gather(s: Solver, n: Node) -> None:
    """Gather(x, axis, index): one constant index cuts there, else the dimension freezes."""
    x, axis, index = n.args[0].name, n.args[1], n.args[2]
    dims = list(s.dims[x])
    axis %= len(dims)
    if isinstance(index, int):
        cut.select(s, n)
        return
    if isinstance(index, list) and len(index) == 1 and not is_frozen(dims[axis]):
        at = index[0] % dims[axis].size
        left, dims[axis], _ = cut.cuts3(s, dims[axis], at, at + 1)
        s.edit(n, ("args", 2, 0), left, when=s.dims[x][axis], value=None if at else 0)
        s.put(n.outputs[0], dims)
        return
    if axis == 0 and s.graph.tensors[x].static:
        s.tables.append(x)
    s.space.freeze(dims[axis], f"looked up by {n.title()}")
    shape = s.shape(n.outputs[0])
    rank = len(shape) - len(dims) + 1
    block: Sequence[Expr] = [s.space.atom(k, "an index") for k in shape[axis:axis + rank]]
    if isinstance(index, Ref):
        s.freeze(s.dims[index.name], "an index")
        block = s.dims[index.name]
    s.put(n.outputs[0], [*dims[:axis], *block, *dims[axis + 1:]])


def gather_nd(s: Solver, n: Node) -> None:
    """GatherND(x, index, batch_dims): the dimensions that an index names freeze."""
    x, index, batch = n.args[0].name, n.args[1].name, n.args[2]
    dims, at = s.dims[x], s.dims[index]
    last = batch + at[-1].size
    s.freeze(dims[:last], f"looked up by {n.title()}")
    s.freeze(at, "an index")
    s.put(n.outputs[0], [*at[:-1], *dims[last:]])


def scatter_nd(s: Solver, n: Node) -> None:
    """ScatterND(x, index, updates): written dimensions freeze, the others agree."""
    x, index, updates = (s.dims[a.name] for a in n.args[:3])
    named = index[-1].size
    s.freeze((*x[:named], *index, *updates[:len(index) - 1]), f"{n.title()} writes into it")
    for e, o in zip(x[named:], updates[len(index) - 1:], strict=True):
        s.relate(e, o, n)
    s.put(n.outputs[0], x)


def depth_to_space(s: Solver, n: Node) -> None:
    """DepthToSpace(x, block, mode): blocks outside (DCR) or inside (CRD) the channels."""
    nest = "(r r c)" if n.args[2] == "DCR" else "(c r r)"
    p.contract(f"b {nest} h w -> b c (h r) (w r)", r=(1, "r"))(s, n)


def resize(s: Solver, n: Node) -> None:
    """Resize(x, axes, sizes, policy): dimensions that keep their size carry over."""
    x, axes, sizes = n.args[0].name, n.args[1], n.args[2]
    dims, shape = list(s.dims[x]), s.shape(n.outputs[0])
    if n.arg(3, "") not in (None, "stretch") or n.arg(4, "") == "tf_crop_and_resize":
        s.freeze(dims, f"{n.op} works along it")
    for d, e in enumerate(dims):
        if e.size != shape[d] or (d >= 2 and is_frozen(e)):
            s.space.freeze(e, f"{n.op} works along it")
            dims[d] = s.space.atom(shape[d], f"result of {n.op}")
    for i, d in enumerate(axes or range(len(dims)) if sizes else ()):
        s.edit(n, ("args", 2, i), dims[d])
    s.put(n.outputs[0], dims)


def region_align(s: Solver, n: Node) -> None:
    """RoiAlign / MaxRoiPool (x, regions, ...): channels carry over."""
    dims, shape = s.dims[n.args[0].name], s.shape(n.outputs[0])
    s.freeze((dims[0], *dims[2:]), f"{n.op} works along it")
    for other in list(n.refs())[1:]:
        s.freeze(s.dims[other], "regions")
    made = [s.space.atom(k, f"result of {n.op}") for k in shape]
    s.put(n.outputs[0], [made[0], dims[1], *made[2:]])


def quantize(s: Solver, n: Node) -> None:
    """QuantizeLinear / DequantizeLinear(x, scale, zero point, axis): scales follow their axis.

    A scale of x's rank is one for each block along a dimension: whole blocks go.
    """
    dims, axis = s.dims[n.args[0].name], n.args[3]
    for ref in filter(None, (name(n, 1), name(n, 2))):
        scale = s.dims[ref]
        if len(scale) == 1:
            if scale[0].size > 1:
                s.relate(dims[axis % len(dims)], scale[0], n)
        elif len(scale) == len(dims):
            for e, o in zip(dims, scale, strict=True):
                _block(s, n, e, o)
    s.put(n.outputs[0], dims)


def _block(s: Solver, n: Node, e: Expr, scale: Expr) -> None:
    if scale.size == e.size:
        s.relate(e, scale, n)
    elif e.size % scale.size:
        raise Clash("blocks that do not divide the dimension")
    else:
        outer, inner = s.space.factor(e, e.size // scale.size)
        s.relate(outer, scale, n)
        s.freeze([inner], "inside a block of one scale")


def group_norm(s: Solver, n: Node) -> None:
    """GroupNormalization(x, groups, gain, bias): gains for each group (opset 18) or channel."""
    groups, channels = n.args[1], s.shape(n.args[0].name)[1]
    if s.shape(n.args[2].name)[0] == channels or groups == channels:
        s.freeze([r.norm_groups(s, n)], "statistics are taken over a group of channels")
        return
    refs = [n.args[0].name, *p.operands(n)[2:4]]
    p.relate_pattern(s, n, "b (g i) !*, g, g -> b (g i) !*", refs,
                     sizes={"g": (1, "num_groups", 1)})
    s.space.freeze(s.contractions[-1].letters["i"], "statistics are taken over a group")


def skip_norm(row: Row, at: int) -> Row:
    """A norm of x + skip (+ bias): args are the norm's own, skip at `at`, bias after it.

    The fourth result is the sum itself.
    """

    def skip(s: Solver, n: Node) -> None:
        x = n.args[0].name
        for other in filter(None, (name(n, at), name(n, at + 1))):
            for e, o in zip(reversed(s.dims[x]), reversed(s.dims[other]), strict=False):
                if o.size != 1:
                    s.relate(e, o, n)
        row(s, n)
        for out in n.outputs[1:]:
            if s.shape(out) == s.shape(x):
                s.put(out, s.dims[x])

    return skip


def embed_layer_norm(s: Solver, n: Node) -> None:
    """EmbedLayerNormalization(ids, segments, words, positions, kinds, gain, bias)."""
    hidden = s.dims[n.args[2].name][1]
    for i in (2, 3, 4):
        table = name(n, i)
        if table is not None:
            s.tables.append(table)
            s.space.freeze(s.dims[table][0], f"looked up by {n.title()}")
            s.relate(hidden, s.dims[table][1], n)
    for i in (5, 6):
        s.relate(hidden, s.dims[n.args[i].name][0], n)
    s.freeze([hidden], f"statistics of {n.title()} change with the width")
    ids = s.dims[n.args[0].name]
    for out in n.outputs:
        if len(s.shape(out)) == 3:
            s.put(out, [*ids, hidden])


# --- recurrent layers -------------------------------------------------------------------------


def recurrent(gates: int, states: int) -> Row:
    """X, W, R, B, lengths, initial states ..., P of RNN (1 gate), GRU (3) and LSTM (4).

    x: (t, b, i), w: (d, gates h, i), r: (d, gates h, h), b: (d, 2 gates h), y: (t, d, b, h).
    A hidden channel goes from all gates at once; what the layer feeds back is read, too.
    """

    def row(s: Solver, n: Node) -> None:
        x, w, back, bias, lengths, *states_and_peepholes = p.operands(n)[:5 + states + 1]
        if n.arg(8 + states, "layout"):
            raise Clash("layout 1")
        _, batch, i = s.dims[x or ""]
        d, rows, inputs = s.dims[w or ""]
        s.freeze([d, batch, s.dims[x or ""][0]], "steps and directions of a recurrent layer")
        each, hidden = s.space.factor(rows, rows.size // gates)
        s.freeze([each], "gates of a recurrent layer")
        s.relate(i, inputs, n)
        s.read(n, x or "", 2, "contract")
        _rows(s, n, back, hidden, gates)
        s.relate(s.dims[back or ""][2], hidden, n)
        s.read(n, back or "", 2, "recurrent")
        _rows(s, n, bias, hidden, 2 * gates)
        for k, ref in enumerate(states_and_peepholes):
            if k == states:
                _rows(s, n, ref, hidden, gates - 1)
            elif ref is not None:
                s.freeze(s.dims[ref][:2], "directions of a recurrent layer")
                s.relate(s.dims[ref][2], hidden, n)
        s.freeze([s.dims[lengths][0]] if lengths else [], "lengths")
        s.edit(n, ("args", 7 + states), hidden)
        for out, made in zip(n.outputs, ((s.dims[x or ""][0], d, batch, hidden),
                                         (d, batch, hidden), (d, batch, hidden)), strict=False):
            if len(s.shape(out)) == len(made):
                s.put(out, made)

    return row


def _rows(s: Solver, n: Node, ref: str | None, hidden: Expr, times: int) -> None:
    if ref is not None:
        each, inner = s.space.factor(s.dims[ref][1], s.dims[ref][1].size // times)
        s.freeze([each, s.dims[ref][0]], "gates of a recurrent layer")
        s.relate(inner, hidden, n)


# --- attention --------------------------------------------------------------------------------


def attention(s: Solver, n: Node) -> None:
    """Attention of q, k, v, each (b, s, heads dim) or (b, heads, s, dim).

    args: q, k, v, mask, past keys, past values, heads, key/value heads, scale, bias. The softmax
    scale stays what it was before query/key dimensions go.
    """
    refs = [name(n, i) for i in range(3)]
    if None in refs:
        raise Clash("packed or missing keys and values")
    bias = name(n, 9)
    if bias is not None:
        parts = cut.cuts(s, s.dims[bias][0], [s.dims[ref or ""][-1].size for ref in refs])
        for ref, part in zip(refs, parts, strict=True):
            s.relate(s.dims[ref or ""][-1], part, n)
    _attend(s, n, [s.dims[ref or ""] for ref in refs], [ref or "" for ref in refs])


def _attend(s: Solver, n: Node, dims: Sequence[Sequence[Expr]], refs: Sequence[str]) -> None:
    heads = dims[0][1].size if len(dims[0]) == 4 else n.args[6]
    kv = dims[1][1].size if len(dims[1]) == 4 else n.args[7] or heads
    g = s.space.atom(kv)
    each = s.space.atom(heads // kv)
    bound = [heads_of(s, n, e, g, each if i == 0 else ONE) for i, e in enumerate(dims)]
    (batch, at, d), (_, keys, d2), (_, keys2, e) = bound
    for one, other in ((d, d2), (keys, keys2), (batch, bound[1][0]), (batch, bound[2][0])):
        s.relate(one, other, n)
    s.freeze((at, keys), "positions of attention")
    for ref, part in zip(refs[:2], (d, d2), strict=False):
        s.read(n, ref, -1, "contract")
        s.roles.append((part, "head dim"))
    s.roles += [(g, "head"), (each, "head"), (e, "head dim")]
    _attention_edits(s, n, product((g, each)), g, d)
    for inner in (d, e):  # every query meets every key, then every value
        s.contractions.append(Contraction(n.name, {}, (), (batch, g, each, at, keys, inner)))
    _cache(s, n, (batch, g, d, e))
    out = n.outputs[0]
    nest = product((g, each))
    s.put(out, [batch, at, product((nest, e))] if len(s.shape(out)) == 3 else
          [batch, nest, at, e])


def heads_of(s: Solver, n: Node, dims: Sequence[Expr], g: Expr,
           each: Expr) -> tuple[Expr, Expr, Expr]:
    """Return (batch, positions, head dim), the heads related to g x each."""
    if len(dims) == 4:
        s.relate(dims[1], product((g, each)), n)
        return dims[0], dims[2], dims[3]
    nest, d = s.space.factor(dims[2], dims[2].size // (g.size * each.size))
    s.relate(nest, product((g, each)), n)
    return dims[0], dims[1], d


def _attention_edits(s: Solver, n: Node, heads: Expr, kv: Expr, d: Expr) -> None:
    s.edit(n, ("args", 6), heads)
    if n.args[7]:
        s.edit(n, ("args", 7), kv)
    if n.arg(8, "scale") is None:
        s.edit(n, ("args", 8), d, value=1 / math.sqrt(d.size))


def _cache(s: Solver, n: Node, sizes: tuple[Expr, ...]) -> None:
    """Masks and caches: positions freeze, heads and dims go with keys and values."""
    batch, g, d, e = sizes
    mask = name(n, 3)
    if mask is not None:
        s.freeze(s.dims[mask], "a mask")
    for ref, last in ((name(n, 4), d), (name(n, 5), e)):
        if ref is not None:
            past = s.dims[ref]
            s.freeze([past[2]], "positions of attention")
            for one, other in ((past[0], batch), (past[1], g), (past[3], last)):
                s.relate(one, other, n)
    for out, last in zip(n.outputs[1:3], (d, e), strict=False):
        shape = s.shape(out)
        if len(shape) == 4:
            s.put(out, [batch, g, s.space.atom(shape[2], "positions of attention"), last])


def group_query(s: Solver, n: Node) -> None:
    """GroupQueryAttention: as attention; with rotary tables inside, head dims stay."""
    if name(n, 1) is None:
        _packed_query(s, n)
        return
    attention(s, n)
    if n.arg(10, "do_rotary"):
        for ref in (name(n, 0), name(n, 1)):
            dims = s.dims[ref or ""]
            heads = n.args[6] if ref == name(n, 0) else n.args[7]
            s.freeze([s.space.factor(dims[-1], dims[-1].size // heads)[1]], "rotated inside")


def _packed_query(s: Solver, n: Node) -> None:
    """Queries, keys and values beside each other in the first input."""
    x, heads, kv = name(n, 0) or "", n.args[6], n.args[7]
    batch, at, total = s.dims[x]
    d = total.size // (heads + 2 * kv)
    parts = cut.cuts(s, total, [heads * d, kv * d, kv * d])
    for part in parts:  # no tensor carries them alone, so that none could be masked
        s.freeze([s.space.factor(part, d)[1]], "inside of fused attention")
    _attend(s, n, [[batch, at, part] for part in parts], [])


def packed_attention(s: Solver, n: Node) -> None:
    """com.microsoft.Attention(x, w, b, mask): w holds q, k and v beside each other.

    args: x, w, b, mask, -, -, heads, -, scale, sizes of q, k, v.
    """
    x, w, b = (name(n, i) for i in range(3))
    total = s.dims[w or ""][1]
    sizes = n.arg(9, "sizes") or [total.size // 3] * 3
    parts = cut.cuts(s, total, sizes)
    if b is not None:
        s.relate(total, s.dims[b][0], n)
    for i, part in enumerate(parts):
        s.edit(n, ("args", 9, i), part)
    batch, at, inputs = s.dims[x or ""]
    s.relate(inputs, s.dims[w or ""][0], n)
    s.read(n, x or "", 2, "contract")
    heads = n.args[6]
    for part in parts[:2]:  # no tensor carries them, so that none could be masked
        s.freeze([s.space.factor(part, part.size // heads)[1]], "inside of fused attention")
    _attend(s, n, [[batch, at, part] for part in parts], [])


def rotary(s: Solver, n: Node) -> None:
    """RotaryEmbedding(x, cos, sin, positions; heads): halves of a head rotate each other.

    args: x, cos, sin, positions, heads, dims that rotate (0: all), interleaved.
    """
    x = name(n, 0) or ""
    dims = list(s.dims[x])
    d = dims[-1]
    if len(dims) == 3:
        if not n.args[4]:
            raise Clash("the number of heads is not given")
        nest, d = s.space.factor(dims[2], dims[2].size // n.args[4])
        s.edit(n, ("args", 4), nest)
    s.freeze([dims[0], dims[-2] if len(dims) == 4 else dims[1], d],
             f"{n.op} rotates it by a table")
    for i in (1, 2, 3):
        ref = name(n, i)
        if ref is not None:
            s.freeze(s.dims[ref], f"a table of {n.op}")
    s.put(n.outputs[0], dims)
