"""Run many batches through a program side by side, node by node, so that a weight can be changed
once all that it follows from has been seen, and before anything is computed with it.

Two such runs, one dense and one with what a plan removes read as zero, give sequential repair its
evidence in the time of two forward passes; only what later nodes read is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...axes.choices import Choices
from ...evidence.calls import Batch
from ...groups.solution import Solution
from ..trace import Trace
from .masks import masks
from .runner import Reads, Runner


class Lockstep:
    """All batches of (args, kwargs) at the same node of a program."""

    def __init__(self, trace: Trace, solution: Solution, choices: Choices,
                 batches: Sequence[Batch], stored: Callable[[str], torch.Tensor]) -> None:
        self._reads = masks(solution, choices) if choices else Reads()
        self._order = list(trace.program.graph_module.graph.nodes)
        self._nodes = {node.name: node for node in self._order}
        self._specs = {spec.target: self._nodes[spec.arg.name]
                       for spec in trace.program.graph_signature.input_specs
                       if spec.target is not None}
        first = {str(name): stored(str(name)) for name in self._specs}  # what is put, comes later
        self._at, self._runs = 0, []
        for args, kwargs in batches:
            run = Runner(trace.program, first.__getitem__, reads=self._reads, where=trace.where)
            run.start(*trace.match(args, kwargs))
            self._runs.append(run)

    @torch.no_grad()
    def advance(self, node: str) -> None:
        """Compute everything before a node, in every batch."""
        end = self._order.index(self._nodes[node])
        for i in range(self._at, end):
            for run in self._runs:
                run.step(self._order[i])
        self._at = max(self._at, end)

    def reads(self, node: str, tensor: str) -> list[torch.Tensor]:
        """Return what the next node reads of a tensor, in every batch."""
        at = self._nodes[node]
        return [self._reads.of(at, tensor, value) for value in self.values(tensor)]

    def values(self, tensor: str) -> list[torch.Tensor]:
        """Return a tensor's value in every batch."""
        return [run.value(self._nodes[tensor]) for run in self._runs]

    def put(self, weight: str, value: torch.Tensor) -> None:
        """Let every later node read another value of a stored array."""
        for run in self._runs:
            run.env[self._specs[weight]] = value
