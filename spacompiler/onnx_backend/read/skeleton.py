"""Protobufs of a model without its large arrays, which are lent from memory or stay in files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from .shapes import sizes_of

INLINE = 4096
"""Initialisers above this many bytes stay out of the protobufs that are made of a model."""
_PLAIN = frozenset(ir.DataType[n] for n in (
    "FLOAT DOUBLE FLOAT16 INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 BOOL").split())


def skeleton(model: ir.Model, *, as_inputs: bool = False,
             mapped: bool = False) -> onnx.ModelProto:
    """Return the model as protobuf without its large initialisers.

    They become external (fed to ONNX Runtime from memory), or inputs where only the graph counts.
    With `mapped`, those that lie in data files keep their places there.
    """
    held = {}
    for graph_value in model.graph.initializers.values():
        tensor = graph_value.const_value
        lies = mapped and isinstance(tensor, ir.ExternalTensor)
        fits = tensor is not None and (as_inputs or tensor.dtype in _PLAIN)
        if tensor is not None and fits and tensor.nbytes > INLINE and not lies:
            held[graph_value.name or ""] = tensor
            graph_value.const_value = ir.ExternalTensor(
                "memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(sizes_of(tensor)),
                name=graph_value.name or "", base_dir="")
    try:
        proto = ir.to_proto(model)
    finally:
        for name, tensor in held.items():
            model.graph.initializers[name].const_value = tensor
    if as_inputs:
        _inputs_instead(proto, held)
    return proto


def _inputs_instead(proto: onnx.ModelProto, held: Mapping[str, ir.TensorProtocol]) -> None:
    kept = [t for t in proto.graph.initializer if t.name not in held]
    listed = {v.name for v in proto.graph.input}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(n, int(t.dtype), sizes_of(t))
        for n, t in held.items() if n not in listed)


def external(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the arrays that `skeleton(mapped=True)` leaves out, by name."""
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype in _PLAIN
            and value.const_value.nbytes > INLINE
            and not isinstance(value.const_value, ir.ExternalTensor)}
