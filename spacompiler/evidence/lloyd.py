"""Lloyd's algorithm (1982): k-means from given centres, for rows in no particular unit."""

from __future__ import annotations

import torch

ROUNDS = 100


def lloyd(rows: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centres (count, width) of rows (n, width), and which one owns each row (n,).

    Rows and centres are assigned in turn until nothing moves; a centre that owns none stays.
    """
    owner = torch.full((len(rows),), -1)
    for _ in range(ROUNDS):
        now = torch.cdist(rows, centres).argmin(1)
        if torch.equal(now, owner):
            break
        owner = now
        centres = torch.stack([rows[owner == i].mean(0) if bool((owner == i).any()) else c
                               for i, c in enumerate(centres)])
    return centres, owner
