"""Units of groups that a stock configuration can express."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..axes.choices import Choice, Choices
from .problem import Unit, join


def expressible(units: Sequence[Unit], fits: Callable[[Choices], bool],
                config: str) -> tuple[list[Unit], list[str]]:
    """Return the units (with the counts) that some stock config can express, and what is left out.

    `fits` says whether one can express some choices; `config` is what it is called in notes.

    Units that have no choice are passed over. Each of the others is tried on its own; those of one
    role and size that only work together (encoder and decoder sharing an entry) are joined.
    """

    def legal(unit: Unit) -> tuple[int, ...]:
        some = unit.legal[:-1] if len(unit.legal) <= 16 else unit.legal[len(unit.legal) // 2 :][:1]
        able = [k for k in some if fits(_keeping(unit, k))]
        if len(unit.legal) > 16 and able:
            return unit.legal
        return (*able, unit.legal[-1])

    found: list[Unit] = []
    failed: list[Unit] = []
    for unit in (u for u in units if len(u.legal) > 1):
        counts = legal(unit)
        (found if len(counts) > 1 else failed).append(replace(unit, legal=counts))
    groups: dict[tuple[str, int], list[Unit]] = {}
    for unit in failed:
        original = next(u for u in units if u.name == unit.name)
        groups.setdefault((unit.groups[0].role, unit.size), []).append(original)
    notes = []
    for (role, size), parts in groups.items():
        joined = join(parts)
        counts = legal(joined) if len(parts) > 1 else (size,)
        if len(counts) > 1:
            found.append(replace(joined, legal=counts))
        else:
            notes.append(f"{role} slices of {', '.join(u.name for u in parts[:2])} stay: "
                         f"no stock config of {config} can say fewer")
    return found, notes


def _keeping(unit: Unit, count: int) -> Choices:
    """Choices in which every group of a unit keeps its first slices."""
    choices = {}
    for group in unit.groups:
        table = np.zeros(group.shape, dtype=bool)
        table[..., :count] = True
        choices[group.atom] = Choice(table, group.outers)
    return choices
