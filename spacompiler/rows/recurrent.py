"""Axis primitives of recurrent layers: LSTM, GRU and RNN, whole or one step at a time.

A hidden unit has a row in each gate, and goes from all of them at once. What it feeds back is
read by the layer itself: so the columns of w_hh are masked by the proof (`recurrent` reads), as
those of w_ih are where one layer feeds the next inside of the operator.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..axes.expressions import Expr, concat
from ..graph.ir import Node, Ref
from .findings import Contraction
from .solver import Row, Solver


def layers(gates: int) -> Row:
    """x, states, arrays, biased, layers, dropout, train, both ways, batch first.

    x: (t, b, i); states: (layers ways, b, h); for each layer and way w_ih: (gates h, i),
    w_hh: (gates h, p), b_ih and b_hh: (gates h), and w_hr: (p, h) where h is projected to p;
    y: (t, b, ways p).
    """

    def row(s: Solver, n: Node) -> None:
        x = s.dims[n.args[0].name]
        states = _names(n.args[1])
        (stack, batch, fed), (_, _, hidden) = s.dims[states[0]], s.dims[states[-1]]
        ways = 2 if n.args[7] else 1
        for ref in states:
            s.relate(s.dims[ref][0], stack, n)
            s.relate(s.dims[ref][1], batch, n)
        s.relate(x[0 if n.args[8] else 1], batch, n)
        s.freeze([stack, x[1 if n.args[8] else 0]], "steps and layers of a recurrent layer")
        _project(s, n, fed, hidden)
        inputs, both = x[2], concat([fed] * ways)
        arrays = _names(n.args[2])
        each = len(arrays) // stack.size
        for i in range(stack.size):
            if i == ways:
                inputs = both
            _weights(s, n, arrays[i * each:(i + 1) * each], (*x[:2],), (inputs, fed, hidden),
                     gates, inner=i >= ways)
        s.read(n, n.args[0].name, 2, "contract")
        _put(s, n, ((*x[:2], both), (stack, batch, fed), (stack, batch, hidden)))

    return row


def cell(gates: int) -> Row:
    """One step: x: (b, i), states: (b, h), w_ih: (gates h, i), w_hh: (gates h, h), biases."""

    def row(s: Solver, n: Node) -> None:
        x, states = n.args[0].name, _names(n.args[1])
        (batch, fed), (_, hidden) = s.dims[states[0]], s.dims[states[-1]]
        for ref in (x, *states):
            s.relate(s.dims[ref][0], batch, n)
        s.relate(fed, hidden, n)
        arrays = [a.name for a in n.args[2:] if isinstance(a, Ref)]
        _weights(s, n, arrays, (batch,), (s.dims[x][1], fed, hidden), gates, inner=False)
        s.read(n, x, 1, "contract")
        _put(s, n, [(batch, hidden)] * len(n.outputs))

    return row


def _names(value: Ref | list[Ref] | tuple[Ref, ...]) -> list[str]:
    return [ref.name for ref in (value if isinstance(value, (list, tuple)) else [value])]


def _project(s: Solver, n: Node, fed: Expr, hidden: Expr) -> None:
    """What is fed back is the hidden state, or less of it: told apart by their sizes alone."""
    if fed.size == hidden.size:
        s.relate(fed, hidden, n)
    else:
        s.freeze([hidden], f"{n.op} projects it, which shows in its size")


def _weights(s: Solver, n: Node, arrays: Sequence[str], steps: tuple[Expr, ...],
             axes: tuple[Expr, Expr, Expr], gates: int, *, inner: bool) -> None:
    """Relate the arrays of one layer and way; `inner` if another layer feeds it."""
    inputs, fed, hidden = axes
    for k, ref in enumerate(arrays):
        dims = s.dims[ref]
        if k > 1 and len(dims) == 2:
            s.relate(dims[0], fed, n)
            s.relate(dims[1], hidden, n)
        else:
            each, unit = s.space.factor(dims[0], dims[0].size // gates)
            s.freeze([each], "gates of a recurrent layer")
            s.relate(unit, hidden, n)
        if len(dims) == 2:
            s.contractions.append(Contraction(n.name, {}, (), (*steps, *dims)))
    s.relate(s.dims[arrays[0]][1], inputs, n)
    s.relate(s.dims[arrays[1]][1], fed, n)
    for ref in arrays[0 if inner else 1:2]:
        s.read(n, ref, 1, "recurrent")


def _put(s: Solver, n: Node, results: Sequence[Sequence[Expr]]) -> None:
    for out, dims in zip(n.outputs, results, strict=False):
        s.put(out, dims)
