"""What a network must offer so that its weights can be repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from ..axes.choices import Choices
from ..evidence.calls import Batch
from ..evidence.network import Network
from ..groups.solution import Solution


class Lockstep(Protocol):
    """All batches at the same node of a network, whose later nodes can be given other arrays."""

    def advance(self, node: str) -> None:
        """Compute everything before a node, in every batch."""

    def reads(self, node: str, tensor: str) -> list[torch.Tensor]:
        """Return what the next node reads of a tensor, in every batch."""

    def values(self, tensor: str) -> list[torch.Tensor]:
        """Return a tensor's value in every batch. Raises KeyError if it comes later."""

    def put(self, weight: str, value: torch.Tensor) -> None:
        """Let every later node read another value of a stored array."""


class Repairable(Network, Protocol):
    """A network that takes other values for its arrays; the model that it was read from does not.
    """

    def put(self, name: str, value: torch.Tensor) -> None:
        """Let the network have another value of a stored array."""

    def lockstep(self, solution: Solution, choices: Choices, batches: Sequence[Batch]) -> Lockstep:
        """Run batches side by side, what `choices` remove read as zero."""


@runtime_checkable
class Keeping(Protocol):
    """A network that keeps what was solved, for a run that goes on after this one was killed."""

    def known(self, node: str, arrays: list[str]) -> tuple[Any, list[torch.Tensor]] | None:
        """Return what is kept of a layer: how it was solved, and its arrays."""

    def solved(self, node: str, about: object) -> None:
        """Keep how a layer was solved, once its arrays are put."""
