"""Masks at consumers: the dense file in which removed slices read zero."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...axes.choices import Choices, keep_mask, kept_size
from ...groups.solution import Solution
from ...plan.effects import touched
from ...rows.onnx_integers import zero_point
from ..clones import clean, same_nodes, store, values_of
from ..read.trace import OnnxTrace
from .constants import Constants

MASKED = "_masked"
"""What is added to a value's name for the one in which removed slices are zero."""


def masked(trace: OnnxTrace, solution: Solution, choices: Choices,
           arrays: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """Return the dense model in which every consumer of a removed slice reads zero.

    `arrays` (those that a repair made, if None) are in place of the file's own.
    """
    model = trace.model.clone()
    nodes = dict(zip(trace.nodes, same_nodes(trace, model), strict=True))
    values = {v.name: v for v in values_of(model)}
    for name, array in (trace.repaired if arrays is None else arrays).items():
        store(model, values[name], ir.Tensor(array, name=name), array.shape)
    made = _Masks(model)
    for name, tensors in touched(solution, choices).items():
        node = nodes[name]
        for tensor in sorted(tensors):
            for i, value in enumerate(node.inputs):
                if value is not None and value.name == tensor:
                    mask = keep_mask(solution.solver.dims[tensor], choices)
                    number = trace.facts.types[tensor]
                    at = zero_point(node.op_type, i)
                    zero = node.inputs[at] if at is not None and at < len(node.inputs) else None
                    node.replace_input_with(i, made.of(node, value, mask, number, zero))
    for edit in solution.solver.edits:
        place = trace.places.get((edit.node, edit.path[1]))
        if edit.value is not None and place is not None and place.kind == "attr" \
                and kept_size(edit.when, choices) != edit.when.size:
            _set_default(nodes[edit.node], place.key, edit.value)
    clean(model)
    return model


def _set_default(node: ir.Node, key: str, value: float) -> None:
    """Write a number that the file leaves to the operator, rounded as the pruned model has it."""
    if key not in node.attributes:
        node.attributes[key] = ir.convenience.convert_attribute(key, value)


class _Masks:
    """The masked values of a model: Where(mask, value, 0), once for each.

    Integers of a product read their zero point in place of 0.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.constants = Constants(model)
        self.made: dict[tuple[str, int], ir.Value] = {}
        self.order = {id(n): i for i, n in enumerate(model.graph.all_nodes())}

    def of(self, node: ir.Node, value: ir.Value, mask: np.ndarray, number: int,
           zero: ir.Value | None = None) -> ir.Value:
        """Return the masked value, made before the first of its readers in the node's graph.

        Each branch that reads a value of the graph around it has a masked one of its own.
        """
        name, graph = value.name or "", node.graph
        outer = self.made.get((name, id(self.model.graph)))
        if outer is not None or (name, id(graph)) in self.made:
            return outer or self.made[name, id(graph)]
        zero = zero or self.constants.add(np.zeros((), ir.DataType(number).numpy()),
                                          f"{name}_zero")
        stored = self.constants.add(mask, f"{name}_mask")
        step = ir.Node("", "Where", [stored, value, zero],
                       num_outputs=1, name=f"{name}_where")
        inside = "" if graph is self.model.graph else f"_{len(self.made)}"
        step.outputs[0].name = f"{name}{MASKED}{inside}"
        readers = [user for user, _ in value.uses() if user.graph is graph and user is not step]
        first = min(readers, key=lambda user: self.order[id(user)], default=node)
        self.order[id(step)] = self.order[id(first)]
        graph.insert_before(first, step)  # type: ignore[union-attr]
        self.made[name, id(graph)] = step.outputs[0]
        return step.outputs[0]
