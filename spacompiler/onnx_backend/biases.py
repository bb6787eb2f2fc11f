"""Zero biases in a copy of a file, where a repair needs one and an operator has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..errors import SpaError
from ..evidence.consumers import consumer
from ..groups.solution import Group, Solution
from .clones import same_nodes
from .read.file import OnnxFile
from .read.trace import OnnxTrace
from .run.constants import Constants

OPTIONAL = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
"""Operators that may have a bias, and which of their inputs it is."""


def unbiased(trace: OnnxTrace, solution: Solution, groups: Sequence[Group]) -> list[str]:
    """Return the operators that read a group by stored weights and could have a bias."""
    graph = solution.graph
    nodes = {node.name: node for node in graph.nodes}
    found = []
    for name in dict.fromkeys(read.node for group in groups for read in group.reads):
        at = consumer(graph, nodes[name])
        if at is not None and graph.tensors[at.weight].weight is not None \
                and _is_bare(trace.nodes[name]):
            found.append(name)
    return found


def _is_bare(node: ir.Node) -> bool:
    place = OPTIONAL.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    return place is not None and (len(node.inputs) <= place or node.inputs[place] is None)


def with_biases(trace: OnnxTrace, names: Sequence[str]) -> OnnxFile:
    """Return a copy of the traced file in which the named operators have a bias of zeros.

    Raises SpaError if one of them cannot be given one.
    """
    model = trace.model.clone()
    nodes = dict(zip(trace.nodes, same_nodes(trace, model), strict=True))
    constants = Constants(model)
    for name in names:
        if name not in nodes or not _is_bare(nodes[name]):
            raise SpaError(f"operator {name!r} cannot be given a bias",
                           fix="give the file that was pruned")
        node, out = nodes[name], trace.nodes[name].outputs[0].name or ""
        dtype = ir.DataType(trace.facts.types[out]).numpy()
        place = OPTIONAL[node.op_type]
        node.resize_inputs(max(place + 1, len(node.inputs)))
        node.replace_input_with(place, constants.add(
            np.zeros(trace.facts.shapes[out][1], dtype), f"{out}_bias"))
    return replace(trace.file, model=model, biased=tuple(names))
