"""What an importance pass sees, and what it must offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    import torch

    from ..groups.solution import Group, Member, Solution
    from .statistics import View


@dataclass(frozen=True)
class AdapterStep:
    """`step` and the merged `weight`, both of the adapted weight's shape (or rows of it)."""

    step: torch.Tensor
    weight: torch.Tensor


class Context(Protocol):
    """What an importance pass may look at."""

    solution: Solution
    seed: int

    def stored(self, name: str) -> torch.Tensor:
        """Return a parameter or buffer by its name."""

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array with the group's axes first: (*group.shape, rest)."""

    def powers(self, member: Member, group: Group, p: int) -> tuple[torch.Tensor, float]:
        """Return sum |w|^p of a member: `group.shape`, and how many weights a slice has."""

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
        """Return any statistic of gates by its name: those above, `fisher`, `relevance` (as
        released) or `relevance_positive` (as the paper has it)."""

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
        By backward passes: gates, token_gates, fisher, relevance, relevance_positive; elements,
        vectors, element_squares, hessian; curvature; weight_gradients, weight_squares,
        weight_absolutes.
        """

    def score(self, group: Group, ctx: Context) -> torch.Tensor:
        """Return a float tensor of shape `group.shape`."""
