"""Names of the arrays that a module computes a weight from: weight norm and spectral norm.

>>> terms(("a.weight_g", "a.weight_v"))
({'g': 'a.weight_g', 'v': 'a.weight_v'}, 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ENDS: tuple[Mapping[str, str], ...] = (
    {"g": ".original0", "v": ".original1"},
    {"g": "_g", "v": "_v"},
    {"v": ".original", "left": "._u", "right": "._v"},
    {"v": "_orig", "left": "_u", "right": "_v"},
)
"""What the names end in. `v` is cut as the weight is."""


def terms(names: Sequence[str]) -> tuple[dict[str, str], int]:
    """Return what each term is called, and the place in `ENDS`; ({}, -1) where none fits."""
    for i, ends in enumerate(ENDS):
        found = {term: [n for n in names if n.endswith(end)] for term, end in ends.items()}
        if len(names) == len(ends) and all(len(n) == 1 for n in found.values()):
            return {term: n[0] for term, n in found.items()}, i
    return {}, -1
