"""Gradients of gates: a factor of one on each slice that is read, whose gradient is x dL/dx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Protocol

import torch

from ...axes.expressions import is_frozen
from ...evidence.slots import onto
from ...evidence.turns import Sums, Turns
from ...groups.solution import Group, Solution
from .gate_places import Places, check_apart, read_places
from .step import Change, Step

# kinds of gates: what is added up over examples and positions (fisher: see `settle`)
GATES: dict[str, Change] = {
    "gates": lambda each: each.sum(0),
    "token_gates": lambda each: each.abs().sum(0),
    "relevance": lambda each: each.abs().sum(0),
    "relevance_positive": lambda each: each.abs().sum(0),
}
OF_GATES = frozenset({*GATES, "fisher"})
OF_RELEVANCE = frozenset({"relevance", "relevance_positive"})


class _Kept(Protocol):
    """What a gate keeps for the step back."""

    shape: Sequence[int]
    take: Callable[[torch.Tensor], None]
    saved_tensors: tuple[torch.Tensor]

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _Gate(torch.autograd.Function):
    """A factor of one: what is read passes as it is, forward and back, and is multiplied once."""

    @staticmethod
    def forward(ctx: _Kept, value: torch.Tensor, felt: torch.Tensor, shape: Sequence[int],
                take: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """`felt` takes a gradient, where the value need not."""
        ctx.save_for_backward(value)
        ctx.shape, ctx.take = shape, take
        return value.view_as(value)

    @staticmethod
    def backward(ctx: _Kept, slope: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.take((slope * ctx.saved_tensors[0]).sum_to_size(ctx.shape))
        return slope, None, None, None


@dataclass
class Gates:
    """Gates at `places`; their gradients are in `totals` by (kind, group's name): (slices,)."""

    solution: Solution
    step: Step
    turns: Turns = field(default_factory=Turns)
    totals: Sums = field(init=False)
    places: Places = field(default_factory=dict)
    _apart: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.totals = Sums("gates", self.turns)

    def prepare(self, kinds: set[str], groups: Sequence[Group]) -> None:
        """Start at zero for groups. Raises SpaError where a kind cannot tell examples apart."""
        for group in groups:
            for kind in kinds:
                self.totals[kind, group.name] = torch.zeros(prod(group.shape), dtype=torch.float64)
        if kinds:
            self.places = read_places(self.solution, groups)
            check_apart(self.solution.graph, kinds, groups, self.places)

    def through(self, at: tuple[str, str], value: torch.Tensor) -> torch.Tensor:
        """Return what is read at a place through a gate, which is what is read.

        The gate's gradient is taken in when backward gets there.
        """
        return _Gate.apply(value, torch.zeros((), requires_grad=True),  # type: ignore[no-any-return]
                           self._shape(at, value), partial(self._open, at))

    def _shape(self, at: tuple[str, str], value: torch.Tensor) -> list[int]:
        """The shape of a gate at a place: one factor per removable slice.

        There is one per example and position too if those are told apart, and one per number for
        relevance; it broadcasts to the value's shape.
        """
        apart = self.step.kinds & (OF_GATES - {"gates"})
        tensor = self.solution.graph.tensors[at[1]]
        if apart & OF_RELEVANCE:  # |R| of every number
            return list(value.shape)
        if tensor.static:  # of an array there is but one, whatever the examples
            own = {dim for _, dim in self.places[at]}
            return [n if d in own else 1 for d, n in enumerate(value.shape)]
        dynamic = set(tensor.dynamic) if apart else set()
        if apart and not dynamic and len(value) == self.step.count:
            dynamic = {0}
        dims = self.solution.solver.dims[at[1]]
        return [n if d in dynamic or not is_frozen(e) else 1
                for d, (n, e) in enumerate(zip(value.shape, dims, strict=True))]

    def _open(self, at: tuple[str, str], gradient: torch.Tensor) -> None:
        gradient = gradient.cpu()
        for group, dim in self.places[at]:
            own = gradient.abs() if self.step.kinds & OF_RELEVANCE else gradient
            each = onto(own, self.solution.solver.dims[at[1]], dim, group)
            for kind in self.step.kinds & GATES.keys():
                self.totals.gather((kind, group.name), GATES[kind](each) * self.step.part)
            if "fisher" in self.step.kinds:
                alone = _fold(each, self.step.count)
                key = (self.turns.at, group.name)
                have = self._apart.get(key)
                self._apart[key] = alone if have is None else have.add_(alone)

    def settle(self) -> None:
        """fisher: square each example's own gradient, `count` times its part of the mean."""
        for key in [key for key in self._apart if key[0] == self.turns.at]:
            own = self._apart.pop(key)
            self.totals.gather(("fisher", key[1]), (own * self.step.count).square().sum(0))


def _fold(each: torch.Tensor, count: int) -> torch.Tensor:
    """Add up positions example by example: (count, slices)."""
    if len(each) % count:
        raise ValueError(f"{len(each)} positions are not those of {count} examples")
    return each.reshape(count, -1, each.shape[1]).sum(1)
