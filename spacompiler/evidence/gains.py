"""Gains: arrays that scale each channel by itself, as consumers of one product a channel.

In norm(x) * gain, or in a layer norm, each channel has one stored number, which can be fitted
like any other weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..graph.ir import Graph, Node, Ref
from .consumers import Consumer, Shaper, operands
from .origins import Dims

Gain = tuple[str, str, Shaper | None]


def _scaled(graph: Graph, node: Node) -> Gain | None:
    """mul(x, gain), either way round."""
    if not all(isinstance(a, Ref) for a in node.args[:2]):
        return None
    one, two = operands(node, 0, 1)
    return (two, one, None) if graph.tensors[one].static else (one, two, None)


def _normed(norm: Callable[..., torch.Tensor], eps: int
            ) -> Callable[[Graph, Node], Gain | None]:
    """A norm of the last dimension, (x, shape, gain, ...), with eps at an argument."""

    def row(graph: Graph, node: Node) -> Gain | None:
        shape, by = node.args[1], node.arg(eps, "eps", None)
        if len(shape) != 1 or not isinstance(node.arg(2, "weight", None), Ref):
            return None
        more = {} if by is None else {"eps": by}
        return *operands(node, 0, 2), lambda x: norm(x, shape, **more)  # type: ignore[return-value]

    return row


GAINS: dict[str, Callable[[Graph, Node], Gain | None]] = {
    "aten.mul": _scaled, "aten.layer_norm": _normed(functional.layer_norm, 4),
    "aten.rms_norm": _normed(functional.rms_norm, 3),
}
_SAME = {f"aten.{op}" for op in "to _to_copy clone contiguous dropout view reshape slice".split()}


def gain(graph: Graph, name: str) -> Consumer | None:
    """Return what scales the channels (last dimension) of a tensor, as one product for each.

    X is (channels, samples, 1), W (channels, 1, 1). Between it and the tensor may lie what leaves
    channels as they are. None where no stored array does that.
    """
    node = next((n for n in graph.nodes if name in n.outputs), None)
    op = node.op.rsplit(".", 1)[0] if node is not None else ""
    if node is None or (op in _SAME and graph.tensors[node.args[0].name].shape[-1:]
                        != graph.tensors[name].shape[-1:]):
        return None
    if op in _SAME:
        return gain(graph, node.args[0].name)
    found = GAINS[op](graph, node) if op in GAINS else None
    if found is None:
        return None
    tensor, weight, patch = found
    shape, rank = graph.tensors[weight].shape, len(graph.tensors[tensor].shape)
    if graph.tensors[weight].weight is None or graph.tensors[tensor].shape[-1:] != shape \
            or graph.tensors[name].shape[-1:] != shape:
        return None
    order: tuple[Dims, Dims, Dims] = ((rank - 1,), tuple(range(rank - 1)), ())
    return Consumer(node, tensor, weight, f"gain {node.name}", patch, None, order, ((0,), (), ()),
                    order)
