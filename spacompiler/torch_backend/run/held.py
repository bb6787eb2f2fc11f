"""Stored arrays of a program that runs, fetched where a node reads them and let go after it.

A program that takes all of its arrays when it starts holds them until the last node has read its
own: in float64, four times a checkpoint in half precision. Here the environment holds how each is
fetched. What is computed in float64 is widened where it is used, the large arrays of products and
tables a few rows at a time: what is made of them never leaves the core's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

ENTRIES = 1 << 17
"""Entries of an array that are widened at a time."""
LARGE = 1 << 20
"""Arrays of fewer entries are widened whole."""


@dataclass(frozen=True, slots=True)
class Held:
    """A stored array that is not read yet."""

    name: str
    fetch: Callable[[str], torch.Tensor]

    def get(self) -> torch.Tensor:
        """Return the array."""
        return self.fetch(self.name)


def linear(x: torch.Tensor, weight: torch.Tensor,
           bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x weight' + bias in float64; x (..., i), weight (o, i), bias (o).

    All rows are widened into one place: a new one each time would leave holes in the heap.
    """
    wide, rows = x.double(), max(1, ENTRIES // weight.shape[1])
    made = wide.new_empty(*x.shape[:-1], len(weight))
    place = wide.new_empty(rows, weight.shape[1])
    for at in range(0, len(weight), rows):
        block = weight[at:at + rows]
        made[..., at:at + rows] = functional.linear(wide, place[:len(block)].copy_(block))
    return made if bias is None else made + bias.double()


def embedding(weight: torch.Tensor, places: torch.Tensor, *rest: object,
              **more: object) -> torch.Tensor:
    """Return the rows of a table in float64; weight (n, d)."""
    found: torch.Tensor = torch.ops.aten.embedding.default(weight, places, *rest, **more)
    return found.double()


IN_PARTS: Mapping[Any, tuple[int, Callable[..., torch.Tensor]]] = {
    torch.ops.aten.linear.default: (1, linear),
    torch.ops.aten.embedding.default: (0, embedding),
}
"""By operator, which of its arguments is a stored array, and what computes it in float64 without
that array being widened as a whole."""
