"""Rows for products of integers: what is removed reads as the zero point, not as zero.

`ZERO_POINTS` says where the zero point of an input stands, so that masks can put it in place of
what is removed.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..axes.expressions import Expr
from ..axes.space import Clash
from ..graph.ir import Node
from . import primitives as p
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


def zero_point(op: str, index: int) -> int | None:
    """Return which input holds the zero point of an input, None if it has none."""
    return ZERO_POINTS.get(op, {}).get(index)
