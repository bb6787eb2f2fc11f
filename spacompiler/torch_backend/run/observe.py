"""See what places of a traced program read, while it runs node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...axes.choices import Choices
from ...evidence.calls import Batch, examples
from ...evidence.network import Place, See, Stored
from ...groups.solution import Solution
from ...store.mapped import let_go
from ..trace import Trace
from .lockstep import Lockstep
from .runner import Reads, Runner


@dataclass
class ProgramNetwork:
    """A traced program as a network that evidence is drawn from, and that can be repaired."""

    trace: Trace

    def stored(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer by its name in the traced program."""
        program = self.trace.program
        return (program.state_dict[name] if name in program.state_dict
                else program.constants[name]).detach()

    def done(self, names: Iterable[str]) -> None:
        """Let go of stored arrays that were read."""
        let_go(map(self.stored, names))

    def static(self, name: str, stored: Stored) -> torch.Tensor:
        """Return the value of a tensor that follows from stored arrays alone."""
        tensors = self.trace.graph.tensors
        weight = tensors[name].weight
        if weight is not None:
            return stored(weight)
        nodes = {node.name: node for node in self.trace.program.graph.nodes}

        def value(node: fx.Node) -> Any:
            known = tensors.get(node.name)
            if known is not None and known.weight is not None:
                return stored(known.weight)
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            return node.target(*args, **kwargs)  # type: ignore[operator]

        with torch.no_grad():
            return value(nodes[name])

    def observe(self, batches: Iterable[Batch], places: Mapping[Place, float], see: See, *,
                together: bool = False, tick: Callable[[], None] = lambda: None,
                shown: Callable[[], None] = lambda: None) -> Iterator[set[Place]]:
        """Run batch after batch, or, `together`, all batches from node to node.

        What no later node reads is dropped on the way.
        """
        by_node: dict[str, set[str]] = {}
        for node, tensor in places:
            by_node.setdefault(node, set()).add(tensor)
        runs = (self._steps(i, batch, by_node, see) for i, batch in enumerate(batches))
        if not together:
            for run in runs:
                for _ in run:
                    pass
                shown()
                tick()
            yield set(places)
            return
        side_by_side = list(runs)
        for name in [n.name for n in self.trace.graph.nodes if n.name in by_node]:
            for run in side_by_side:
                next(run)
                shown()
            yield {(name, tensor) for tensor in by_node[name]}

    def put(self, name: str, value: torch.Tensor) -> None:
        """Let the program have another value of a stored array; the module's own stays."""
        program = self.trace.program
        home = program.state_dict if name in program.state_dict else program.constants
        array = self.trace.laid[name] = self.trace.room.lay(value.contiguous())
        home[name] = torch.nn.Parameter(array, requires_grad=False) \
            if isinstance(home[name], torch.nn.Parameter) else array
        self.trace.repaired.add(self.trace.tied.get(name, name))

    def lockstep(self, solution: Solution, choices: Choices,
                 batches: Sequence[Batch]) -> Lockstep:
        """Run batches side by side, what `choices` remove read as zero."""
        return Lockstep(self.trace, solution, choices, batches, self.stored)

    def _steps(self, number: int, batch: Batch, by_node: Mapping[str, set[str]],
               see: See) -> Iterator[str]:
        """Run one batch without gradients, pausing at the nodes whose reads are seen."""
        args, kwargs = self.trace.match(*batch)
        count = examples(args, kwargs)

        def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
            see(number, node.name, name, value, count)
            return value

        runner = Runner(self.trace.program, self.stored, reads=Reads(by_node, touch),
                        where=self.trace.where)
        steps = runner.steps(args, kwargs, {*by_node})
        while True:
            with torch.no_grad():
                node = next(steps, None)
            if node is None:
                return
            yield node
