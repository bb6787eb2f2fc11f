"""A float32 model as the same model in float64, for proofs.

Kernels that ONNX Runtime lacks in float64 (convolutions, poolings, erf) are replaced by ONNX's
reference implementation, with convolutions by torch: slow, exact, and only for small models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from ..read.bodies import body_graphs
from ..read.shapes import sizes_of
from ..read.stored import let_go

FLOAT, DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
# inputs that stay float32 whatever the others are
_KEPT = {"Resize": (1, 2), "Upsample": (1,)}


def to_double(model: ir.Model) -> ir.Model:
    """Return the model with every float32 value in float64 (in place; arrays when read)."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if all(i in _KEPT.get(n.op_type, ()) for n, i in uses) and uses:
            continue
        if value.const_value is not None and value.const_value.dtype == FLOAT:
            value.const_value = _double(value.const_value, value.name or "")
            value.type = ir.TensorType(DOUBLE)
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == FLOAT:
            value.type = ir.TensorType(DOUBLE)
    for node in graph.all_nodes():
        _attributes(node)
        inner = [value for body in body_graphs(node) for value in body.inputs]
        for value in (*node.outputs, *inner):
            if value.dtype == FLOAT:
                value.type = ir.TensorType(DOUBLE)
    return model


def _double(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    def read() -> ir.Tensor:
        wide = tensor.numpy().astype(np.float64)
        let_go(tensor)
        return ir.Tensor(wide, name=name)

    return ir.LazyTensor(read, dtype=DOUBLE, shape=ir.Shape(sizes_of(tensor)), name=name)


def _attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT:
            array = attribute.as_tensor().numpy().astype(np.float64)
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(array))
    if node.op_type in ("Cast", "EyeLike", "RandomNormalLike") and \
            node.attributes.get_int("to" if node.op_type == "Cast" else "dtype", 1) == 1:
        key = "to" if node.op_type == "Cast" else "dtype"
        if key in node.attributes:
            node.attributes[key] = ir.AttrInt64(key, int(DOUBLE))
    if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1)))


def feeds(given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return inputs with float32 made float64."""
    return {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in given.items()}


def evaluate(model: ir.Model, given: Mapping[str, np.ndarray]) -> list[Any]:
    """Run a model by ONNX's reference implementation, convolutions and poolings by torch."""
    from onnx.reference import ReferenceEvaluator

    from .kernels import KERNELS

    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(ir.to_proto(model), new_ops=list(KERNELS)).run(
            None, dict(given)))
