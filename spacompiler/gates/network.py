"""A traced network with gates: a factor on each slice, at the places where consumers read it.

These are the places of the proof's masks and of the gates that scores are gathered with, so that a
gate of zero is a slice that is gone. Where a score is read (a router's), a gate z adds log z.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from ..axes.choices import Choices
from ..evidence.calls import Batch
from ..evidence.consumers import Consumer
from ..evidence.slots import onto, slots
from ..evidence.where import DOUBLE, HERE
from ..groups.solution import Group, Solution
from ..torch_backend.gather.gate_places import Places, read_places
from ..torch_backend.run.masks import masks, norms
from ..torch_backend.run.recompute import budget
from ..torch_backend.run.runner import Override, OverridingRunner, Reads, Touch
from ..torch_backend.trace import Trace

Place = tuple[str, str]
Pooled = Callable[[torch.Tensor], torch.Tensor]
Values = Mapping[str, torch.Tensor]
Gates = Mapping[str, "torch.Tensor | Pooled"]
"""By group: one factor a slice (`group.shape`), or a function of what is read, pooled by example:
(examples, slices) -> (examples, slices)."""
LEAST = 1e-6
"""Where the logarithm of a closed gate on a router's score ends."""
HELD = 3 << 26, 1 << 27
"""Bytes held for backward, at the least: of the last segments' values, of dear ones. No gradient of
a weight is held besides, which would dwarf them: a pass with frozen weights is what this is beside.
"""
Weights = Callable[[str], torch.Tensor]


@dataclass
class Gated:
    """A program whose reads of some groups go through gates."""

    trace: Trace
    solution: Solution
    groups: Sequence[Group]
    places: Places = field(init=False)
    scores: dict[Place, list[tuple[Group, int]]] = field(init=False)
    _slots: dict[tuple[str, str, str], tuple[list[int], torch.Tensor]] = field(
        default_factory=dict)

    def __post_init__(self) -> None:
        self.places = read_places(self.solution, self.groups)
        self.scores = {}
        for group in self.groups:
            for read in dict.fromkeys(r for r in group.reads if r.how == "score"):
                self.scores.setdefault((read.node, read.tensor), []).append((group, read.dim))

    def ungated(self) -> list[str]:
        """Return the names of groups that are read nowhere that a gate can stand."""
        read = {g.name for found in self.places.values() for g, _ in found}
        return [g.name for g in self.groups if g.name not in read]

    def call(self, batch: Batch, gates: Gates, *, choices: Choices | None = None,
             weights: Weights | None = None, override: Mapping[str, Override] | None = None,
             double: bool = False, watch: Callable[[str, Any], None] | None = None,
             lean: bool = False) -> list[Any]:
        """Return the flat results of one call.

        `choices` are what is masked beside gates of zero: at scores, and where no gate stands.
        `override` replaces nodes, with their gates. A `lean` run holds less for backward.
        """
        choices, override = choices or {}, override or {}
        hard = masks(self.solution, choices) if choices else Reads()
        gated = {at: found for at, found in self.places.items() if at[0] not in override}
        scores = {} if choices else self.scores
        everywhere: dict[str, set[str]] = {n: set(t) for n, t in hard.places.items()
                                           if n not in override}
        for node, tensor in (*gated, *scores):
            everywhere.setdefault(node, set()).add(tensor)
        traced = (self.trace.args, self.trace.kwargs)
        runner = OverridingRunner(
            self.trace.program, weights, where=DOUBLE if double else HERE, watch=watch,
            reads=Reads(everywhere, self._touch(gated, scores, gates, hard)),
            override={**norms(self.solution, choices), **override},
            held=budget(self.solution.graph, traced, batch, *HELD) if lean else None)
        results = runner.call(*batch)
        if not torch.is_grad_enabled():
            runner.close()
        return results

    def _touch(self, gated: Places, scores: Places, gates: Gates, hard: Reads) -> Touch:
        def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
            at = (node.name, name)
            if at in gated:
                for group, dim in gated[at]:
                    value = value * self.spread(at, group, dim, gates[group.name], value)
            elif at in scores:
                for group, dim in scores[at]:
                    factor = self.spread(at, group, dim, gates[group.name], value)
                    value = value + factor.clamp(min=LEAST).log()
            elif hard.touch is not None:
                value = hard.touch(node, name, value)
            return value

        return touch

    def spread(self, at: Place, group: Group, dim: int, gate: torch.Tensor | Pooled,
               value: torch.Tensor) -> torch.Tensor:
        """Return a group's gate in a form that broadcasts to what is read at a place."""
        axes, index = self.slots(at, group, dim)
        sizes = dict(zip(axes, index.shape, strict=True))
        if not isinstance(gate, torch.Tensor):  # one for each example
            dims = self.solution.solver.dims[at[1]]
            pooled = onto(value.detach().abs(), dims, dim, group)
            pooled = pooled.reshape(len(value), -1, prod(group.shape)).mean(1)
            made = gate(pooled.to(value.dtype)).to(value.dtype)
            made = torch.cat([made, made.new_ones(len(made), 1)], 1)[:, index]
            return made.reshape(len(value), *(sizes.get(d, 1) for d in range(1, value.ndim)))
        flat = gate.reshape(-1).to(value.dtype)
        made = torch.cat([flat, flat.new_ones(1)])[index]
        return made.reshape([sizes.get(d, 1) for d in range(value.ndim)])

    def slots(self, at: Place, group: Group, dim: int) -> tuple[list[int], torch.Tensor]:
        """The dimensions that decide a position's slice at a place, and the slice there (or -1)."""
        key = (*at, group.name)
        if key not in self._slots:
            axes, found = slots(self.solution.solver.dims[at[1]], dim, group)
            self._slots[key] = axes, torch.from_numpy(found)
        return self._slots[key]

    def features(self, place: Place, at: Consumer, group: Group) -> torch.Tensor:
        """Return the slice that each feature of a product belongs to, or -1: (shared, features)."""
        dim = next(d for g, d in self.places[place] if g is group)
        axes, index = self.slots(place, group, dim)
        shape = self.shape(at)
        sizes = dict(zip(axes, index.shape, strict=True))
        marks = (index + 1).double().reshape([sizes.get(d, 1) for d in range(len(shape))])
        return at.inputs(marks.expand(shape)).amax(1).long() - 1

    def shape(self, at: Consumer) -> list[int]:
        """The shape of what a product reads, of one example (and position, where it has no patches)
        """
        tensor = self.solution.graph.tensors[at.tensor]
        return [1 if d in tensor.dynamic and (d == 0 or at.patch is None) else n
                for d, n in enumerate(tensor.shape)]


def ones(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """Gates that are all open."""
    return {g.name: torch.ones(g.shape) for g in groups}
