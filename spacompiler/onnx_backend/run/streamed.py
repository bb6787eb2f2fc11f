"""A model computed operator by operator: arrays are fetched where one reads them, dropped after it.

ONNX Runtime takes all arrays of a model when it opens it: in float64, twice what a file of float32
holds. Here a file of any size is proved in float64 in the room of its largest array and of what is
computed at the moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper

from ..read.bodies import body_graphs
from ..read.shapes import node_results


def evaluate(model: ir.Model, given: Mapping[str, np.ndarray]) -> list[Any]:
    """Run a model by ONNX's reference implementation, convolutions and poolings by torch.

    Raises NotImplementedError for operators that hold graphs of their own.
    """
    from .kernels import KERNELS

    imports = [helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    values: dict[str, np.ndarray] = dict(given)
    left = _readers(model)
    for node in model.graph:
        if next(body_graphs(node), None) is not None:
            raise NotImplementedError(f"{node.op_type} holds a graph")
        names = dict.fromkeys(v.name or "" for v in node.inputs if v is not None and v.name)
        feeds = {name: _value(model, name, values) for name in names}
        made = node_results(ir.to_proto(node), feeds, imports, KERNELS)
        wanted = (o.name or "" for o in node.outputs if o.name)
        values.update((n, a) for n, a in zip(wanted, made, strict=True) if left.get(n))
        for name in names:
            left[name] -= 1
            if not left[name]:
                values.pop(name, None)
    return [_value(model, v.name or "", values) for v in model.graph.outputs]


def _readers(model: ir.Model) -> dict[str, int]:
    """How many operators read each value, and one more for a result of the model."""
    found: dict[str, int] = {}
    for node in model.graph:
        for name in {v.name or "" for v in node.inputs if v is not None and v.name}:
            found[name] = found.get(name, 0) + 1
    for value in model.graph.outputs:
        found[value.name or ""] = found.get(value.name or "", 0) + 1
    return found


def _value(model: ir.Model, name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """What an operator reads: a value that was computed, or a stored array as it is now."""
    if name in values:
        return values[name]
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
