"""The curvature of the loss at consumers: the sum of g g', g its gradient by what one gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...evidence.consumers import Consumer
from ...evidence.room import Room
from ...evidence.turns import Sums, Turns
from ..run.runner import Override
from ..trace import Program
from .step import Step, hand_on


@dataclass
class Curvature:
    """`totals` by consumer: the sum of g g' over samples, (shared, outputs, outputs).

    g is the gradient of the total loss of a batch. `routes` are the places where consumers read
    how samples are dealt out.
    """

    step: Step
    turns: Turns = field(default_factory=Turns)
    room: Room = field(default_factory=Room)
    totals: Sums = field(init=False)
    routes: set[tuple[str, str]] = field(default_factory=set)
    _outputs: dict[str, Consumer] = field(default_factory=dict)
    _dealt: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.totals = Sums("curvature", self.turns, self.room.take)

    def prepare(self, consumers: Iterable[Consumer]) -> None:
        """Say at which consumers it is wanted."""
        self._outputs = {c.node.name: c for c in consumers}
        self.routes = {place for c in self._outputs.values() for place in c.places[1:]}

    def route(self, place: tuple[str, str], value: torch.Tensor) -> None:
        """Note how the samples of this batch are dealt out."""
        self._dealt[place] = value

    def probes(self, program: Program) -> dict[str, Override]:
        """Return, by node, consumers with a zero added to what they give: its gradient is taken."""
        targets = {node.name: node.target for node in program.graph.nodes}

        def probe(name: str) -> Override:
            def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
                result = targets[name](*args, **kwargs)  # type: ignore[operator]
                zero = torch.zeros_like(result, requires_grad=True)
                hand_on(zero, partial(self._add, self._outputs[name]))
                return result + zero

            return run

        return {name: probe(name) for name in self._outputs}

    def _add(self, at: Consumer, gradient: torch.Tensor) -> None:
        g = at.outputs(gradient * self.step.count)
        if at.route is not None:
            g, _ = at.route.deal(g[0], self._dealt[at.places[1]])
        self.totals.gather(at.node.name, (g.mT @ g).cpu())
