"""Rows for products of integers: what is removed reads as the zero point, not as zero.

`ZERO_POINTS` says where the zero point of an input stands, so that masks can put it in place of
what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..axes.expressions import Expr
from ..axes.space import Clash
from ..graph.ir import Node
from . import primitives as p
from .findings import Contraction
from .onnx_rows import name
from .solver import Row, Solver

ZERO_POINTS: Mapping[str, Mapping[int, int]] = {
    "ConvInteger": {0: 2, 1: 3}, "MatMulInteger": {0: 2, 1: 3}, "QLinearConv": {0: 2, 3: 5},
    "QLinearMatMul": {0: 2, 3: 5}, "DequantizeLinear": {0: 2},
}
"""By operator: the input of integers, and that of their zero point."""


def dynamic_quantize(s: Solver, n: Node) -> None:
    """DynamicQuantizeLinear(x) -> y, scale, zero point: its range holds zero in any case, so that
    zeros in place of what is removed change neither."""
    x = n.args[0].name
    dims = s.dims[x]
    for d, e in enumerate(dims):
        if e.size > 1:
            s.read(n, x, d, "sum")
    s.put(n.outputs[0], dims)
    for out in n.outputs[1:]:
        s.put(out, ())


def convolution(x: int, w: int, group: int, *, window: int, per_output: tuple[int, ...],
                single: tuple[int, ...]) -> Row:
    """A convolution of the integers at x and w; arguments `window` are strides, padding and
    dilations. What stands at `per_output` is one number, or one for each output channel."""

    def row(s: Solver, n: Node) -> None:
        _single(s, n, single)
        made = Node(n.name, n.op, (n.args[x], n.args[w], None, *n.args[window:window + 3],
                                   n.args[group]), {}, n.outputs)
        p.convolution(s, made)
        if s.edits and s.edits[-1].node == n.name:
            last = s.edits.pop()
            s.edit(n, ("args", group), last.expr)
        _per_output(s, n, per_output, s.dims[n.args[w].name][0])

    return row


def matmul(a: int, b: int, *, per_output: tuple[int, ...], single: tuple[int, ...]) -> Row:
    """A matrix product of the integers at a and b, as `convolution`."""

    def row(s: Solver, n: Node) -> None:
        _single(s, n, single)
        p.matmul(s, Node(n.name, n.op, (n.args[a], n.args[b]), {}, n.outputs))
        _per_output(s, n, per_output, s.dims[n.args[b].name][-1])

    return row


def _single(s: Solver, n: Node, at: tuple[int, ...]) -> None:
    for i in at:
        ref = name(n, i)
        if ref is not None and any(e.size > 1 for e in s.dims[ref]):
            raise Clash("scales or zero points for each row of the activation")


def _per_output(s: Solver, n: Node, at: tuple[int, ...], output: Expr) -> None:
    for i in at:
        ref = name(n, i)
        for e in s.dims[ref] if ref is not None else ():
            if e.size > 1:
                s.relate(e, output, n)


def matmul_blocks(s: Solver, n: Node) -> None:
    """MatMulNBits(x (..., k), w (n, blocks, bytes), scales, zero points, order, bias, K, N).

    Numbers of few bits, a scale for each block of inputs: whole blocks go, and single outputs.
    """
    x, w, scales, zeros, order, bias = (name(n, i) for i in range(6))
    *outer, k = s.dims[x or ""]
    rows, blocks, inner = s.dims[w or ""]
    if order is not None or k.size % blocks.size:
        raise Clash("inputs that are not whole blocks in turn")
    nest, each = s.space.factor(k, k.size // blocks.size)
    s.relate(nest, blocks, n)
    s.freeze([each, inner], "inside a block of one scale")
    for ref in filter(None, (scales, zeros, bias)):
        _rows_of_blocks(s, n, ref, rows, blocks)
    s.read(n, x or "", -1, "contract")
    s.edit(n, ("args", 6), k)
    s.edit(n, ("args", 7), rows)
    s.contractions.append(Contraction(n.name, {}, (), (*outer, rows, k)))
    s.put(n.outputs[0], [*outer, rows])


def _rows_of_blocks(s: Solver, n: Node, ref: str, rows: Expr, blocks: Expr) -> None:
    """Relate an array of one number a row, or one a row and block, flat or not, to both."""
    first, *rest = s.dims[ref]
    if not rest and first.size > rows.size:
        first, last = s.space.factor(first, first.size // rows.size)
        rest = [last]
    s.relate(first, rows, n)
    if rest and rest[0].size == blocks.size:
        s.relate(rest[0], blocks, n)
    elif rest:
        s.freeze([rest[0], blocks], "zero points of several blocks in one byte")


def experts(s: Solver, n: Node) -> None:
    """MoE(x (..., h), router (t, e), w1 (e, f i, h), b1, w2 (e, h, i), b2, w3 (e, i, h), b3, f).

    Channels inside the experts go, the same in all of them, and those of x; f is 2 where the gate
    lies in w1, too, turn about (fusion 1) or after the others (2).
    """
    x, router, w1, b1, w2, b2, w3, b3 = (name(n, i) for i in range(8))
    hidden = s.dims[x or ""][-1]
    count, back, inner = s.dims[w2 or ""]
    s.freeze([*s.dims[router or ""], count], "experts that a router chooses")
    s.relate(hidden, back, n)
    for ref in filter(None, (w1, w3)):
        s.relate(s.dims[ref][2], hidden, n)
    for ref in filter(None, (w1, b1, w3, b3)):
        _inside(s, n, s.dims[ref], (count, inner))
    if b2 is not None:
        s.relate(s.dims[b2][0], count, n)
        s.relate(s.dims[b2][1], hidden, n)
    s.read(n, x or "", -1, "contract")
    s.read(n, w2 or "", 2, "recurrent")  # no tensor carries these channels: w2 reads them
    for ref in filter(None, (w1, w2, w3)):
        macs = (*s.dims[x or ""][:-1], *s.dims[ref][1:])
        s.contractions.append(Contraction(n.name, {}, (), macs))
    s.put(n.outputs[0], s.dims[x or ""])


def _inside(s: Solver, n: Node, dims: Sequence[Expr], of: tuple[Expr, Expr]) -> None:
    """Relate (e, f i, ...) to experts and their channels."""
    count, inner = of
    s.relate(dims[0], count, n)
    one = dims[1]
    if one.size > inner.size:
        turns = n.args[8] == 1
        outer, last = s.space.factor(one, 2 if turns else inner.size)
        one, each = (outer, last) if turns else (last, outer)
        s.freeze([each], "what is gated and its gate")
    s.relate(one, inner, n)


def zero_point(op: str, index: int) -> int | None:
    """Return which input holds the zero point of an input, None if it has none."""
    return ZERO_POINTS.get(op, {}).get(index)
