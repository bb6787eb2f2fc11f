"""What evidence is drawn from: a network that runs, and whoever computes its gradients.

A *place* is a node and a tensor that it reads, both by their names in the graph. What places read
is shown while a network runs; how it runs (a traced program node by node, a file in ONNX Runtime
with some of its tensors exposed) is the network's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..groups.solution import Group, Member
from .calls import Batch
from .consumers import Consumer
from .turns import Turns

Place = tuple[str, str]
Loss = Callable[[list[Any], tuple[Any, ...], dict[str, Any]], torch.Tensor]
Stored = Callable[[str], torch.Tensor]
Seen = Callable[[str, str, torch.Tensor, int], None]
"""(node, tensor, value, examples in the batch)"""
See = Callable[[int, str, str, torch.Tensor, int], None]
"""(number of the batch, node, tensor, value, examples in the batch)"""


class Network(Protocol):
    """A network whose arrays can be read and which runs on batches of (args, kwargs)."""

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array; integers (quantised ones) as floats."""

    def static(self, name: str, stored: Stored) -> torch.Tensor:
        """Return the value of a tensor that follows from arrays alone, which `stored` gives."""

    def observe(self, batches: Iterable[Batch], places: Mapping[Place, float], see: See, *,
                together: bool = False, tick: Callable[[], None] = lambda: None,
                shown: Callable[[], None] = lambda: None) -> Iterator[set[Place]]:
        """Run on batches and show what is read at places; yield places once all batches have.

        A place is given with the bytes of what is made of it. With `together`, batches may advance
        side by side, so that places are complete one after the other; else no more is held than
        what one batch needs. `tick` is called for each batch that is done (not with `together`),
        `shown` for each batch, in their order, that shows no more before the next places are
        yielded.
        """


class GradientSource(Protocol):
    """Takes gradients of a loss, and holds them as sums (see `Context` for what they are)."""

    kinds: frozenset[str]
    gates: dict[tuple[str, str], torch.Tensor]
    sums: dict[tuple[str, str, Member], torch.Tensor]
    arrays: dict[tuple[str, str], torch.Tensor]
    curvature: dict[str, torch.Tensor]
    turns: Turns
    batches: int
    examples: int

    def prepare(self, kinds: set[str], groups: Sequence[Group],
                consumers: Iterable[Consumer] = ()) -> None:
        """Say what is to be gathered, for which groups and their consumers."""

    def gather(self, batches: Sequence[Batch], loss: Loss, see: See,
               observed: Mapping[str, set[str]], tick: Callable[[], None]) -> None:
        """Take in batches, telling `see` what nodes read at the places in `observed`."""

    def curve(self, batches: Sequence[Batch], loss: Loss, see: See,
              observed: Mapping[str, set[str]]) -> None:
        """Add batches to the curvature, and to nothing else that is gathered here."""
