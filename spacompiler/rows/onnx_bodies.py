"""Rows for operators with bodies: If, Loop and Scan, whose bodies' nodes stand in the graph before
them.

A body that is run again and again begins by a node of its own, `start`, which makes what the body
reads: states are what they were outside, and come out as they went in.
"""

from __future__ import annotations

from ..axes.space import Clash
from ..graph.ir import Node, Ref
from .solver import Solver

START = ".start"
"""What is added to `Loop` and `Scan` for the node by which a body begins."""
_STEPS = "steps of a loop"


def branches(s: Solver, n: Node) -> None:
    """If(condition, results of one branch, results of the other): both agree."""
    if len(n.args) < 3:
        raise Clash("branches whose results differ in shape")
    s.freeze(s.dims[n.args[0].name] if isinstance(n.args[0], Ref) else (), "a condition")
    for out, one, other in zip(n.outputs, n.args[1], n.args[2], strict=True):
        for e, o in zip(s.dims[one.name], s.dims[other.name], strict=True):
            s.relate(e, o, n)
        s.put(out, s.dims[one.name])


def start(s: Solver, n: Node) -> None:
    """start(states, scanned, axes) -> counters, states, one step of each scanned value."""
    states, scanned, axes = n.args
    counters = len(n.outputs) - len(states) - len(scanned)
    for out in n.outputs[:counters]:
        s.put(out, ())
    for out, state in zip(n.outputs[counters:], states, strict=False):
        s.put(out, s.dims[state.name])
    for out, whole, axis in zip(n.outputs[counters + len(states):], scanned, axes, strict=True):
        dims = list(s.dims[whole.name])
        s.freeze([dims.pop(axis % len(dims))], _STEPS)
        s.put(out, dims)


def repeat(s: Solver, n: Node) -> None:
    """Loop and Scan (states, states after a step, results of a step, axes): a state keeps its axes,
    results of all steps are stacked along one more."""
    states, after, steps, axes = n.args
    for out, state, made in zip(n.outputs, states, after, strict=False):
        for e, o in zip(s.dims[state.name], s.dims[made.name], strict=True):
            s.relate(e, o, n)
        s.put(out, s.dims[state.name])
    for out, made, axis in zip(n.outputs[len(states):], steps, axes, strict=False):
        dims = list(s.dims[made.name])
        at = axis % (len(dims) + 1)
        dims.insert(at, s.space.atom(s.shape(out)[at], _STEPS))
        s.put(out, dims)
