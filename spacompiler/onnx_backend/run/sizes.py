"""Sizes of an exported ONNX graph: symbols that turned out to be numbers are written as such."""

from __future__ import annotations

import onnx_ir as ir


def settle(model: ir.Model) -> None:
    """Replace symbolic dimensions that are called by a number (`"4"`) by that number, in place.

    The exporter leaves such where the module's code needed to know a size.
    """
    for node in model.graph:
        for value in node.outputs:
            _settle(value.shape)
    for value in (*model.graph.inputs, *model.graph.outputs):
        _settle(value.shape)


def _settle(shape: ir.Shape | None) -> None:
    for i, size in enumerate(shape or ()):
        name = size.value if isinstance(size, ir.SymbolicDim) else None
        if shape is not None and name is not None and name.isdigit():
            shape[i] = int(name)
