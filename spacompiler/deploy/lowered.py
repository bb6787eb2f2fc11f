"""From version 18 of ONNX's operators, the oldest that torch's exporter writes, to version 17.

What changed between the two is how few operators take their arguments: reductions took `axes` as
an attribute, and Split had no `num_outputs`. What is new in 18 cannot be said in 17.
"""

from __future__ import annotations

from typing import NoReturn

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from ..errors import SpaError

_REDUCTIONS = frozenset("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean "
                        "ReduceMin ReduceProd ReduceSumSquare".split())
_SAME = frozenset("Resize Pad ScatterElements ScatterND LpPool".split())
"""Operators of 18 that are those of 17 where they have none of the newer attributes and inputs."""
_NEWER: dict[str, frozenset[str]] = {
    "Resize": frozenset({"antialias", "axes", "keep_aspect_ratio_policy"}),
    "LpPool": frozenset({"ceil_mode", "dilations"})}


def lower(model: ir.Model, opset: int) -> None:
    """Write a model of version 18 in version 17, in place.

    Raises SpaError for an operator that version 17 cannot say.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in list(graph.all_nodes()):
            if node.domain in ("", "ai.onnx"):
                _lower(node, opset)
    model.graph.opset_imports[""] = opset
    ir_passes.RemoveUnusedNodesPass()(model)


def _lower(node: ir.Node, opset: int) -> None:
    if node.op_type in _REDUCTIONS and len(node.inputs) > 1:
        _axes_as_attribute(node)
    elif node.op_type == "Split" and "num_outputs" in node.attributes:
        _refuse(node, "pieces by their number")
    elif node.op_type in _SAME:
        newer = _NEWER.get(node.op_type, frozenset()) & node.attributes.keys()
        reduction = node.attributes.get("reduction")
        if newer or (node.op_type == "Pad" and len(node.inputs) > 3) or (
                reduction is not None and reduction.as_string() in ("max", "min")):
            _refuse(node, "an argument of version 18")
    elif onnx.defs.get_schema(node.op_type, 18).since_version > opset \
            and node.op_type not in _REDUCTIONS | {"Split"}:
        _refuse(node, "an operator of version 18")


def _axes_as_attribute(node: ir.Node) -> None:
    value = node.inputs[1]
    axes = None if value is None else ir.convenience.get_const_tensor(value)
    if value is not None and axes is None:
        _refuse(node, "computed axes")
    if axes is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _refuse(node: ir.Node, what: str) -> NoReturn:
    raise SpaError("the model cannot be written in version 17 of ONNX's operators",
                   where=f"{node.op_type} {node.name or ''}".strip(), why=f"it has {what}",
                   fix="use --opset 18 or newer")
