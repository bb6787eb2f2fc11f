"""What a pass is: a frozen dataclass with a name, options as fields, and one method.

An importance pass scores slices, an allocation pass turns scores into counts under a budget, a
compensation pass repairs what stays, a recovery pass trains it. Fifteen lines make one's own:

    @dataclass(frozen=True)
    class Largest:
        name: ClassVar[str] = "largest"
        needs: ClassVar[tuple[str, ...]] = ()

        def score(self, group, ctx):
            return sum(ctx.rows(m, group).abs().amax(-1) for m in group.members)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from .allocation import Problem
    from .groups import Group, Member, Solution
    from .plan import Plan
    from .statistics import View

KINDS = ("importance", "allocation", "compensation", "recovery")


class Context(Protocol):
    """What an importance pass may look at."""

    solution: Solution
    seed: int

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array with the group's axes first: (*group.shape, rest)."""

    def gradient_rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return the loss gradient of a stored array likewise (needs `weight_gradients`)."""

    def consumers(self, group: Group) -> list[View]:
        """Return every consumer of the group as a matrix product X W', with its statistics.

        `moments`, `covariance` and `fluctuation` of X are there if needed (see `statistics`).
        """

    def gates(self, group: Group) -> torch.Tensor:
        """Return the derivative of the loss by a gate on each slice: shape `group.shape`.

        The gate multiplies what every consumer reads (needs `gates`).
        """

    def token_gates(self, group: Group) -> torch.Tensor:
        """Return the same, absolute values summed over examples and positions (`token_gates`)."""


class Importance(Protocol):
    """Score every slice of a group: the lowest go first."""

    name: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics to gather: any of gates, token_gates, weight_gradients (by backward passes),
        moments, covariance, fluctuation (forward only: they exist for ONNX models too)."""

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return a float tensor of shape `group.shape`."""


class Allocation(Protocol):
    """Decide how many slices each unit keeps."""

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit name; each must be legal for its unit."""


class Compensation(Protocol):
    """Repair the weights that stay, given what goes (before anything is sliced)."""

    name: ClassVar[str]

    def run(self, solution: Solution, plan: Plan, weights: dict[str, torch.Tensor],
            batches: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the dense arrays that change, by name."""


class Recovery(Protocol):
    """Train the pruned module in place."""

    name: ClassVar[str]

    def run(self, module: torch.nn.Module, batches: Sequence[Any],
            loss: Callable[..., torch.Tensor]) -> None: ...
