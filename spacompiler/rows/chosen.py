"""Rows of routers: scores along an axis, the best of them chosen, and positions as values.

What is removed from an axis of scores reads minus infinity: softmax gives it nothing and a choice
of the best never takes it, so long as as many stay as are chosen. Chosen positions are integers
(`Solver.labels`); what they look up, and their counts, lie along the same axis and shrink with it:
then every position is a smaller number, in the same order. An operator that does anything else
with them (arithmetic, a comparison) freezes the axis.
"""

from __future__ import annotations

from ..axes.expressions import is_frozen
from ..graph.ir import Node
from .findings import Label
from .primitives import relate_pattern, works_along
from .reductions import SCORES, along, choose
from .solver import Row, Solver

EXPERTS = "an expert goes only where its router's score becomes minus infinity, not zero"


def scores(argument: int = 1) -> Row:
    """softmax and its like: as `along`, but free where positions are chosen along the axis."""
    mixed = along(argument, why=SCORES)

    def row(s: Solver, n: Node) -> None:
        x = next(n.refs())
        e = s.dims[x][n.arg(argument, "dim", -1)]
        if not s.choosing or is_frozen(e) or not _floating(s, x):
            return mixed(s, n)
        s.read(n, x, n.arg(argument, "dim", -1), "score")
        s.scored.append((e, works_along(n, SCORES)))
        s.put(n.outputs[0], s.dims[x])

    return row


def best(s: Solver, n: Node) -> None:
    """topk(x, k, dim, largest, sorted): values and positions of the largest."""
    x, k = n.args[0].name, n.args[1]
    dim = n.arg(2, "dim", -1) % len(s.dims[x])
    e = s.dims[x][dim]
    if not s.choosing or is_frozen(e) or not n.arg(3, "largest", True) or not (
            isinstance(k, int) and k < e.size and _floating(s, x)):
        return along(2, why=SCORES)(s, n)
    s.read(n, x, dim, "score")
    s.scored.append((e, works_along(n, SCORES)))
    s.least.append((e, k))
    for out in n.outputs:
        s.put(out, [s.space.atom(k, f"result of {n.op}") if d == dim else other
                    for d, other in enumerate(s.dims[x])])
    if n.name in s.choosing:
        s.labels[n.outputs[1]] = Label(e, "position")
        s.roles.append((e, "expert"))


def _floating(s: Solver, ref: str) -> bool:
    return s.graph.tensors[ref].dtype.startswith(("float", "bfloat"))


def carried(row: Row) -> Row:
    """A row whose first result holds values of the first operand, moved or copied, alone."""

    def carry(s: Solver, n: Node) -> None:
        row(s, n)
        ref, out = next(n.refs()), n.outputs[0]
        if s.graph.tensors[out].dtype in ("int64", "int32", "float32", "float64"):
            e = s.label(n, ref)
            if e is not None:
                s.labels[out] = Label(e, "position")

    return carry


def histc(s: Solver, n: Node) -> None:
    """histc(positions, bins, 0, bins - 1): how often each was chosen."""
    x, *numbers = n.args
    e = s.label(n, x.name)
    s.freeze(s.dims[x.name], works_along(n))
    if e is None or numbers != [e.size, 0, e.size - 1]:
        s.give_up(n, f"{n.title()} counts values")
        return
    s.edit(n, ("args", 1), e)
    s.edit(n, ("args", 3), e, plus=-1)
    s.put(n.outputs[0], [e])
    s.labels[n.outputs[0]] = Label(e, "count")


def cumsum(s: Solver, n: Node) -> None:
    """cumsum(x, dim): what was never chosen counts zero, and adds nothing to the others."""
    x = n.args[0].name
    e = s.label(n, x, "count")
    if e is None:
        along()(s, n)
        return
    s.put(n.outputs[0], [e])
    s.labels[n.outputs[0]] = Label(e, "end")


def grouped_mm(s: Solver, n: Node) -> None:
    """grouped_mm(x, weights, ends): rows of x by the expert they go to; its kernel wants rows
    of whole 16 bytes."""
    x, weights, ends = (a.name for a in n.args)
    e = s.label(n, ends, "end")
    bound = relate_pattern(s, n, "! i, ! i o, ! -> ! o" if e is None else "! i, ... i o -> ! o",
                           [x, weights, ends], why=EXPERTS)
    if e is not None:
        choose(s, n, weights, 0, e)
    digits = "".join(filter(str.isdigit, s.graph.tensors[x].dtype))
    for letter in "io":
        s.multiples.append((bound[letter], 128 // int(digits)))
