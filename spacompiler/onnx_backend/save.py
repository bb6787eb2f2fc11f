"""Write a model of ONNX to a file, large ones with their arrays beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from .read.shapes import sizes_of

EXTERNAL_BYTES = 2**30


def save(model: ir.Model, path: Path) -> int:
    """Save a model, large ones with external data beside it; return the bytes of weights."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values()
               if v.const_value is not None)
    large = size > EXTERNAL_BYTES
    ir.save(model if large else _gathered(model), path,
            external_data=f"{path.name}.data" if large else None)
    return size


def _gathered(model: ir.Model) -> ir.Model:
    """Return the model with arrays that lie in other files read into it when it is written."""
    found = model.clone()
    for value in found.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = _read(tensor)
    return found


def _read(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    return ir.LazyTensor(lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name),
                         dtype=tensor.dtype, shape=ir.Shape(sizes_of(tensor)), name=tensor.name)
