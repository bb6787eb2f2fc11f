"""Bodies of Loop and Scan: what goes in, what comes out, and along which axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import onnx_ir as ir

LOOPS = ("Loop", "Scan")


class Body(NamedTuple):
    """A body and what it is given: `states` with what they are inside and after a step, `scanned`
    values with one step of each, results of `steps`; and the axes of the last two.

    `counters` are inputs of the body alone: the number of the step, and whether to go on.
    """

    graph: ir.Graph
    counters: Sequence[ir.Value]
    states: Sequence[ir.Value]
    inside: Sequence[ir.Value]
    after: Sequence[ir.Value]
    scanned: Sequence[ir.Value]
    each: Sequence[ir.Value]
    steps: Sequence[ir.Value]
    axes: tuple[tuple[int, ...], tuple[int, ...]]


def body_graphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that a node holds (branches of If, bodies of Loop and Scan)."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def body_of(node: ir.Node) -> Body | None:
    """Return the body of a Loop or Scan; None for other nodes, and for what Scan was in opset 8."""
    graph = next(body_graphs(node), None)
    if node.op_type not in LOOPS or graph is None or any(v is None for v in node.inputs[2:]):
        return None
    given = [v for v in node.inputs if v is not None]
    inner, results = list(graph.inputs), list(graph.outputs)
    if node.op_type == "Loop":
        states = [v for v in node.inputs[2:] if v is not None]
        count = len(states)
        return Body(graph, inner[:2], states, inner[2:], results[1:1 + count], (), (),
                    results[1 + count:], ((), (0,) * (len(results) - 1 - count)))
    scans = node.attributes.get_int("num_scan_inputs", 0)
    count = len(given) - scans
    if len(inner) != len(given) or len(given) != len(node.inputs):
        return None
    axes = (_axes(node, "scan_input_axes", scans),
            _axes(node, "scan_output_axes", len(results) - count))
    return Body(graph, (), given[:count], inner[:count], results[:count], given[count:],
                inner[count:], results[count:], axes)


def _axes(node: ir.Node, name: str, count: int) -> tuple[int, ...]:
    said = node.attributes.get(name)
    return tuple(said.value) if said is not None else (0,) * count
