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

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from .allocation import Problem
    from .groups import Group, Member, Solution
    from .job import Job
    from .live.adapter_step import AdapterStep
    from .repair import Evidence
    from .statistics import View
    from .training import Training

KINDS = ("importance", "allocation", "schedule", "compensation", "recovery")


class Context(Protocol):
    """What an importance pass may look at."""

    solution: Solution
    seed: int

    def stored(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer by its name."""

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array with the group's axes first: (*group.shape, rest)."""

    def onto(self, values: torch.Tensor, member: Member, group: Group,
             then: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """Sum values of a stored array's shape onto the group: `group.shape`.

        With `then`, values are summed over each channel of the member first, and `then` applied.
        """

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

    def gate(self, kind: str, group: Group) -> torch.Tensor:
        """Return any statistic of gates by its name: those above, `fisher` or `relevance`."""

    def sums(self, kind: str, member: Member, group: Group) -> torch.Tensor:
        """Return a sum over the weights of a member, shape `group.shape`, by its name.

        `elements`: |w dL/dw|; `vectors`: |sum of w dL/dw over a channel|; `element_squares`:
        (w dL/dw)^2 of single examples; `hessian`: w (H g).
        """

    def gradient(self, kind: str, name: str) -> torch.Tensor:
        """Return the gradient of a whole array: `weight_gradients` (summed over batches),
        `weight_squares` or `weight_absolutes` (g^2 or |g|, summed over examples)."""

    def gradient_rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return `weight_gradients` of a stored array with the group's axes first."""

    @property
    def batches(self) -> int:
        """Batches that gradients were taken over."""

    @property
    def examples(self) -> int:
        """Examples that gradients were taken over."""

    def adapted(self, member: Member, group: Group, *, eta: float,
                scaled: bool) -> AdapterStep | None:
        """Return `step` and merged `weight` of an adapted array, both as rows (`adapter_steps`).

        None where no adapter sits.
        """


class Importance(Protocol):
    """Score every slice of a group: the lowest go first."""

    name: ClassVar[str]

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics to gather, by name.

        Forward only, so that they exist for ONNX models too: moments, covariance, fluctuation.
        By backward passes: gates, token_gates, fisher, relevance; elements, vectors,
        element_squares, hessian; curvature; weight_gradients, weight_squares, weight_absolutes.
        """

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return a float tensor of shape `group.shape`."""


class Allocation(Protocol):
    """Decide how many slices each unit keeps."""

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit name; each must be legal for its unit."""


class Schedule(Protocol):
    """Decide what goes while training: masks grow, and what was learned is folded in."""

    name: ClassVar[str]

    def run(self, job: Job) -> None:
        """Train the job's module in place and set its `candidates`, `counts` and `scores`."""


class Compensation(Protocol):
    """Repair the weights that stay, given what goes (before anything is sliced).

    `sequential` asks for evidence from the pruned and repaired network instead of the dense one,
    `residual` for an output that makes good the sum it is added into, `create_biases` for a bias
    in every linear layer and convolution that loses inputs. A pass may have two methods more:
    `again`, like `solve`, for the second step of a sequential repair, and `draft()`, a quicker
    pass that stands in for it while allocations are tried out.
    """

    name: ClassVar[str]
    sequential: bool
    residual: bool
    create_biases: bool

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new weights (outputs, features) and what to add to the bias (outputs,).

        `kept` (features,) marks the features that stay.
        """


class Recovery(Protocol):
    """Train the pruned module."""

    name: ClassVar[str]

    def run(self, task: Training) -> dict[str, Any]:
        """Train `task.module` in place and return what happened, as plain data for the report."""
