"""The operators that torch's ONNX exporter can translate: its table, read once."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def words(opset: int) -> Any:
    """Return the exporter's table for a version of ONNX's operators."""
    from torch.onnx._internal.exporter import _registration

    return _registration.ONNXRegistry.from_torchlib(opset_version=opset)
