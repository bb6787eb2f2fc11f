"""Which windows of a text to calibrate on: those near to what the text has many of, or far from it.

The prototype metric of data pruning (Sorscher et al., Beyond neural scaling laws, NeurIPS 2022):
k-means over an embedding of the examples, and the distance of each to its centre. An example near
to its centre is typical; where data is scarce typical ones are to be kept, where it is plentiful
the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .lloyd import lloyd

CHOICES = ("random", "near", "far")
"""How calibration windows are chosen of a text."""

Order = Callable[[torch.Tensor], torch.Tensor]
"""Token windows (n, length) to the order in which they are taken (n,)."""


def by_prototype(table: torch.Tensor, how: str, seed: int) -> Order:
    """Return an order of windows by their distance to the nearest of sqrt(n) centres.

    A window's embedding is the mean of its tokens' rows of `table` (vocabulary, width), less the
    mean over windows, of length one. `how` is near (typical ones first) or far.
    """
    def order(ids: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([table[one].double().mean(0) for one in ids])
        rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
        apart = distances(rows, max(1, round(len(rows) ** 0.5)), seed)
        return apart.argsort(descending=how == "far", stable=True)

    return order


def distances(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return how far each row (n, width) is from its centre under k-means (n,).

    The first centre is drawn, each further one is the row that lies farthest from all so far.
    """
    draws = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(rows), (1,), generator=draws))
    centres = rows[first : first + 1]
    for _ in range(count - 1):
        far = torch.cdist(rows, centres).amin(1).argmax()
        centres = torch.cat([centres, rows[far : far + 1]])
    centres, owner = lloyd(rows, centres)
    return (rows - centres[owner]).norm(dim=1)
