"""What is under way while gradients are gathered, and leaves that hand theirs on at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Step:
    """What one backward pass gathers: `kinds`, of `count` examples.

    Their loss is `part` of the mean over the batch that they are from.
    """

    kinds: set[str] = field(default_factory=set)
    count: int = 1
    part: float = 1.0


def as_is(value: torch.Tensor) -> torch.Tensor:
    """Return a value unchanged, whatever its shape."""
    return value


def hand_on(leaf: torch.Tensor, take: Callable[[torch.Tensor], None]) -> None:
    """Let `take` have a leaf's gradient, of the leaf's shape, as soon as backward has made it."""
    def reduce(tensor: torch.Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            take(gradient)

    leaf.register_post_accumulate_grad_hook(reduce)
