"""k-means over a few hundred vectors, for combining adapters: seeded by torch's generator."""

from __future__ import annotations

import torch

from ..evidence.lloyd import lloyd


def clustered(units: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` centroids of vectors (n, d), each of its members' mean norm, (count, d).

    As many clusters as vectors are the vectors themselves.
    """
    if count >= len(units):
        return units
    centres, label = lloyd(units, _spread(units, count))
    norms = units.norm(dim=1)
    for k in range(count):
        members = label == k
        length = centres[k].norm()
        if members.any() and length:
            centres[k] *= norms[members].mean() / length
    return centres


def _spread(units: torch.Tensor, count: int) -> torch.Tensor:
    """First centres: each drawn by its squared distance from those before (k-means++)."""
    chosen = [int(torch.randint(len(units), ()))]
    for _ in range(count - 1):
        far = torch.cdist(units, units[chosen]).min(1).values.square()
        far[chosen] = 0
        chosen.append(int(torch.multinomial(far, 1)) if far.sum() else
                      next(n for n in range(len(units)) if n not in chosen))
    return units[chosen].clone()
