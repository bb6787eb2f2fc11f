"""What nodes of a file read once those before them have other arrays, in every batch.

ONNX Runtime computes whole graphs, so that each question is answered by a run of what leads to the
tensor that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from ...axes.choices import Choices
from ...groups.solution import Solution
from ...plan.effects import touched
from ..read.trace import OnnxTrace
from .masks import MASKED, masked
from .session import Session, hidden

Feeds = Sequence[Mapping[str, np.ndarray]]


class FileLockstep:
    """All batches at one place of a file in which what `choices` remove reads zero.

    Arrays are those that the trace has when this is made, and what is `put` later.
    """

    def __init__(self, trace: OnnxTrace, solution: Solution, choices: Choices,
                 feeds: Feeds) -> None:
        self._trace, self._solution, self._choices = trace, solution, choices
        self._touched, self._feeds = touched(solution, choices), feeds
        self._arrays = dict(trace.repaired)
        nodes = solution.graph.nodes
        self._order = {node.name: i for i, node in enumerate(nodes)}
        self._made = {out: i for i, node in enumerate(nodes) for out in node.outputs}
        self._at = 0

    def advance(self, node: str) -> None:
        """Go on to a node: tensors that it and later ones make are not known yet."""
        self._at = max(self._at, self._order[node])

    def reads(self, node: str, tensor: str) -> list[torch.Tensor]:
        """Return what the next node reads of a tensor, in every batch."""
        return self._run(tensor + MASKED if tensor in self._touched.get(node, ()) else tensor)

    def values(self, tensor: str) -> list[torch.Tensor]:
        """Return a tensor's value in every batch. Raises KeyError if it comes later."""
        if self._made.get(tensor, -1) >= self._at:
            raise KeyError(tensor)
        return self._run(tensor)

    def put(self, weight: str, value: torch.Tensor) -> None:
        """Let every later node read another value of a stored array."""
        self._arrays[weight] = self._trace.array(weight, value.numpy())

    def _run(self, name: str) -> list[torch.Tensor]:
        if name in self._trace.feeds:
            return [torch.from_numpy(np.array(feed[name])) for feed in self._feeds]
        model = masked(self._trace, self._solution, self._choices, self._arrays)
        _cut(model, name)
        session = Session(model, [name])
        return [torch.from_numpy(session.run(feed, [name])[0]) for feed in self._feeds]


def _cut(model: ir.Model, name: str) -> None:
    """Leave what leads to one value of a graph, which is then its only result."""
    wanted = next((v for node in model.graph for v in node.outputs if v.name == name), None)
    if wanted is None:
        raise hidden(name)
    model.graph.outputs.clear()
    model.graph.outputs.append(wanted)
    passes.RemoveUnusedNodesPass()(model)
