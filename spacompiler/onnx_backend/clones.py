"""Clones of a model: its nodes and values found again, arrays put in, dead ends dropped."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import onnx_ir.passes.common as passes

from .read.bodies import body_graphs
from .read.trace import OnnxTrace


def same_nodes(trace: OnnxTrace, model: ir.Model) -> Iterator[ir.Node]:
    """Yield the clones of the trace's nodes, in the trace's order."""
    order = {id(old): new for old, new in zip(
        trace.model.graph.all_nodes(), model.graph.all_nodes(), strict=True)}
    for node in trace.nodes.values():
        yield order[id(node)]


def values_of(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of a model, those of bodies too."""
    graph = model.graph
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from attribute.as_graph().initializers.values()


def store(model: ir.Model, value: ir.Value, tensor: ir.TensorProtocol,
          shape: tuple[int, ...]) -> None:
    """Let a value be the initialiser `tensor`; a node that made it goes."""
    maker = value.producer()
    if maker is not None:
        name, graph = value.name, model.graph
        stored = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape),
                          type=ir.TensorType(tensor.dtype))
        value.name = f"{name}_dense"
        ir.convenience.replace_all_uses_with(value, stored, replace_graph_outputs=True)
        graph.remove(maker, safe=True)
        graph.register_initializer(stored)
        return
    value.const_value = tensor
    value.shape = ir.Shape(shape)


def clean(model: ir.Model) -> None:
    """Drop dead nodes and unused initialisers, and what the file said about shapes inside."""
    passes.RemoveUnusedNodesPass()(model)
    forget_bodies(model)
    own = {id(value) for value in model.graph.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if id(value) not in own:
                value.shape = None
                value.type = value.type if value.is_graph_output() else None


def forget_bodies(model: ir.Model) -> None:
    """Drop what a file says about shapes of what goes into bodies and comes out.

    Single numbers stay such: ONNX Runtime asks of a Loop that its counter is one.
    """
    for node in model.graph.all_nodes():
        for body in body_graphs(node):
            for value in (*body.inputs, *body.outputs):
                if value.shape is not None and len(value.shape):
                    value.shape = None
