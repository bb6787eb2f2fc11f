"""Rows for operators that carry a state or a cache from token to token."""

from __future__ import annotations

import math

from ..axes.expressions import ONE, Expr, product
from ..axes.space import Clash
from ..graph.ir import Node
from .findings import Contraction
from .onnx_rows import heads_of, name
from .solver import Solver


def linear_attention(s: Solver, n: Node) -> None:
    """LinearAttention of q (b, t, heads k), k (b, t, kv k), v (b, t, kv v) and a state
    (b, kv, k, v); decay (b, t, kv) or (b, t, kv k), rate (b, t, kv) or (b, t, 1).

    args: q, k, v, state, decay, rate, heads, key/value heads, scale. Every update rule keeps rows
    of the state at zero where keys are zero, so that dims of queries and keys may go.
    """
    q, k, v = (name(n, i) or "" for i in range(3))
    heads, kv = n.args[6], n.args[7]
    g, each = s.space.atom(kv), s.space.atom(heads // kv)
    bound = [heads_of(s, n, s.dims[x], g, each if x == q else ONE) for x in (q, k, v)]
    (batch, at, d), (batch2, at2, d2), (batch3, at3, e) = bound
    for one, other in ((d, d2), (batch, batch2), (batch, batch3), (at, at2), (at, at3)):
        s.relate(one, other, n)
    s.freeze([at], "steps of a state")
    for ref, part in ((q, d), (k, d2)):
        s.read(n, ref, -1, "contract")
        s.roles.append((part, "head dim"))
    s.roles += [(g, "head"), (each, "head"), (e, "head dim")]
    _gates(s, n, kv, (g, d))
    s.edit(n, ("args", 6), product((g, each)))
    s.edit(n, ("args", 7), g)
    if not n.arg(8, "scale"):
        s.edit(n, ("args", 8), d, value=1 / math.sqrt(d.size))
    s.contractions.append(Contraction(n.name, {}, (), (batch, g, each, at, d, e), 2))
    state = (batch, g, d, e)
    past = name(n, 3)
    for one, other in zip(state, s.dims[past], strict=True) if past else ():
        s.relate(one, other, n)
    s.put(n.outputs[0], [batch, at, product((g, each, e))])
    for out in n.outputs[1:]:
        s.put(out, state)


def _gates(s: Solver, n: Node, kv: int, axes: tuple[Expr, Expr]) -> None:
    """Decay and rate: one number a head, for all heads, or (decay) for each dim of a head."""
    g, d = axes
    for ref in filter(None, (name(n, 4), name(n, 5))):
        last = s.dims[ref][-1]
        if last.size == kv:
            s.relate(last, g, n)
        elif last.size != 1:
            s.relate(last, product((g, d)), n)


def causal_conv(s: Solver, n: Node) -> None:
    """CausalConvWithState(x (b, c, t), w (c, 1, k), bias (c), state (b, c, k - 1)): a convolution
    of each channel by itself."""
    x, w, bias, past = (name(n, i) for i in range(4))
    batch, channel, at = s.dims[x or ""]
    s.relate(channel, s.dims[w or ""][0], n)
    s.freeze([at, s.dims[w or ""][2]], "steps of a state")
    if bias is not None:
        s.relate(channel, s.dims[bias][0], n)
    if past is not None:
        s.relate(batch, s.dims[past][0], n)
        s.relate(channel, s.dims[past][1], n)
        s.freeze([s.dims[past][2]], "steps of a state")
    s.contractions.append(Contraction(n.name, {}, (), (batch, channel, at, s.dims[w or ""][2])))
    for out in n.outputs:
        steps = s.space.atom(s.shape(out)[2], "steps of a state")
        s.put(out, [batch, channel, steps])


def tensor_scatter(s: Solver, n: Node) -> None:
    """TensorScatter(cache, update, places, axis): the update is written along one axis."""
    cache, update, places = name(n, 0) or "", name(n, 1) or "", name(n, 2)
    old, new = s.dims[cache], s.dims[update]
    axis = n.args[3] % len(old)
    if axis == 0 or len(old) != len(new):
        raise Clash("writes along the batch")
    for d, (e, other) in enumerate(zip(old, new, strict=True)):
        if d == axis:
            s.freeze([e, other], f"{n.title()} writes along it")
        else:
            s.relate(e, other, n)
    if places is not None:
        s.freeze([old[0], *s.dims[places]], "places to write at")
    s.put(n.outputs[0], old)
