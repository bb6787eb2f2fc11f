"""Gradients of weights: reduced to sums of w dL/dw over members of groups, or kept as arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import SpaError
from ...evidence.slots import by_channel
from ...evidence.turns import Sums, Turns
from ...groups.solution import Group, Member, Solution
from .step import Change, Step, as_is

# kinds of sums over a member's w dL/dw: (on single weights, on the sums of channels)
SUMS: dict[str, tuple[Change, Change]] = {
    "elements": (torch.abs, as_is), "vectors": (as_is, torch.abs),
    "element_squares": (torch.square, as_is), "hessian": (as_is, as_is)}
# kinds of whole arrays that are kept, one for each parameter
ARRAYS: dict[str, Change] = {
    "weight_gradients": as_is, "weight_squares": torch.square,
    "weight_absolutes": torch.abs}
OF_WEIGHTS = frozenset({*SUMS, *ARRAYS})
OF_SINGLE = frozenset({"element_squares", "weight_squares", "weight_absolutes"})
"""Kinds that need the gradients of single examples."""


@dataclass
class WeightSums:
    """`sums` by (kind, group, member): (slices,); `arrays` by (kind, weight), of its shape.

    `members` are those of the groups asked for, by the array that they are in.
    """

    solution: Solution
    stored: Callable[[str], torch.Tensor]
    step: Step
    turns: Turns = field(default_factory=Turns)
    sums: Sums = field(init=False)
    arrays: Sums = field(init=False)
    members: dict[str, list[tuple[Member, Group]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums, self.arrays = Sums("sums", self.turns), Sums("arrays", self.turns)

    def prepare(self, groups: Sequence[Group]) -> None:
        """Say whose members' weights count; those that are no parameters have no gradient."""
        kept = self.solution.graph.weights()
        for member, group in ((m, g) for g in groups for m in g.members):
            if kept[member.weight].kind == "parameter":
                self.members.setdefault(member.weight, []).append((member, group))

    def take(self, name: str, gradient: torch.Tensor) -> None:
        """Add a weight's gradient, of its shape, to all that is gathered of it."""
        step = self.step
        for kind in step.kinds & ARRAYS.keys():
            value = ARRAYS[kind](gradient).cpu()
            value = value * step.part if kind == "weight_gradients" and step.part != 1 else value
            self.arrays.gather((kind, name), value)
        sums = step.kinds & SUMS.keys()
        if sums:
            product = self.stored(name).detach().to(gradient.device) * gradient
            for member, group in self.members.get(name, ()):
                self._sum(sums, product, member, group)

    def _sum(self, kinds: set[str], product: torch.Tensor, member: Member, group: Group) -> None:
        dims = self.solution.dims(member.weight)
        for kind in kinds:
            each, then = SUMS[kind]
            value = by_channel(each(product), dims, member.dim, group, then)
            self.sums.gather((kind, group.name, member), value)

    def take_second(self, leaves: Mapping[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Add H g for each weight, from the gradient of <g, g held fixed>.

        `leaves` are the weights by name. Raises SpaError if an operator has no second derivative.
        """
        arrays = list(leaves.values())
        first = torch.autograd.grad(loss, arrays, create_graph=True, allow_unused=True)
        norm = torch.stack([(g * g.detach()).sum() for g in first if g is not None]).sum()
        try:
            second = torch.autograd.grad(norm, arrays, allow_unused=True)
        except (NotImplementedError, RuntimeError) as problem:
            if "autograd formula" not in str(problem):
                raise
            raise SpaError("the network has no second derivatives",
                           why=str(problem).splitlines()[0],
                           fix="use a criterion of first derivatives (taylor, snip)") from problem
        for name, gradient in zip(leaves, second, strict=True):
            if gradient is not None:
                self.take(name, gradient)
