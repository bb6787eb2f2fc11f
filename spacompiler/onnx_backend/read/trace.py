"""A file as the IR sees it, with what leads back from the IR to the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from ...graph.ir import Graph
from ...groups.solution import Solution
from .file import OnnxFile
from .shapes import Facts


class Place(NamedTuple):
    """Where an argument stands in the file: `("input", 1)` or `("attr", "group")`."""

    kind: str
    key: Any


@dataclass
class OnnxTrace:
    """A file's graph as IR, with what is needed to go back: nodes, places, facts, inputs.

    Nothing is `tied` by name: a shared initialiser has one. `repaired` are the arrays that a repair
    puts in place of the file's own, which stay as they are.
    """

    file: OnnxFile
    graph: Graph
    facts: Facts
    feeds: dict[str, np.ndarray]
    nodes: dict[str, ir.Node] = field(default_factory=dict)
    places: dict[tuple[str, int], Place] = field(default_factory=dict)
    filled: dict[str, ir.Node] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def model(self) -> ir.Model:
        """The graph of the file, which stays as it was read."""
        return self.file.model

    args: ClassVar[tuple[Any, ...]] = ()
    """The call that was traced has keywords alone."""
    homes: ClassVar[Sequence[dict[str, Any]]] = ()
    """A repair lets the file's arrays lie where they are."""

    @property
    def kwargs(self) -> dict[str, torch.Tensor]:
        """The inputs that the file was lowered at."""
        return {name: torch.from_numpy(array) for name, array in self.feeds.items()}

    def stored(self, name: str) -> np.ndarray:
        """Return a stored array (mapped from disk where it lies), or what is in place of it."""
        if name in self.repaired:
            return self.repaired[name]
        if name in self.filled:
            node = self.filled[name]
            value = node.attributes.get("value")
            fill = value.as_tensor().numpy().reshape(()) if value else np.float32(0)
            return np.broadcast_to(fill, self.facts.shapes[name])
        tensor = self.model.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def array(self, name: str, value: np.ndarray) -> np.ndarray:
        """Return a value for a stored array in that array's type."""
        kept = ir.DataType(self.facts.types[name]).numpy()
        return np.ascontiguousarray(value.astype(kept, copy=False))


def redrawn(trace: OnnxTrace, solution: Solution, seed: int) -> OnnxTrace:
    """Return a trace with other floating arrays: none of them tiny, dead or equal.

    Matrices keep the size of what they are given, gains and biases lie about 1; a single number
    is an operator's argument, unless it is zero: that may be the gain of a branch.
    """
    draws = np.random.default_rng(seed)
    made = {}
    for name in sorted(solution.graph.weights()):
        old = trace.stored(name)
        if old.dtype.kind == "f" and name not in trace.filled and (old.size > 1 or not old.any()):
            fan = old.size // old.shape[0] if old.ndim > 1 else 0
            new = draws.standard_normal(old.shape) / fan**0.5 if fan else \
                draws.uniform(0.5, 1.5, old.shape)
            made[name] = trace.array(name, new)
    return replace(trace, repaired=made)
