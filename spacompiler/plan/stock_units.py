"""Units of groups that a stock configuration can express."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..axes.choices import Choice
from ..errors import SpaError
from ..groups.solution import Solution
from ..torch_backend.emit.stock import pruned_shapes, uniform_config
from .problem import Unit, join


def expressible(module: Any, tied: Mapping[str, str], solution: Solution,
                units: Sequence[Unit]) -> tuple[list[Unit], list[str]]:
    """Return the units (with the counts) that some stock config can express, and what is left out.

    Units that have no choice are passed over. Each of the others is tried on its own; those of one
    role and size that only work together (encoder and decoder sharing an entry) are joined.
    """

    def legal(unit: Unit) -> tuple[int, ...]:
        some = unit.legal[:-1] if len(unit.legal) <= 16 else unit.legal[len(unit.legal) // 2 :][:1]
        fits = [k for k in some if _fits(module, tied, solution, unit, k)]
        if len(unit.legal) > 16 and fits:
            return unit.legal
        return (*fits, unit.size)

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
                         f"no stock config of {type(module.config).__name__} can say fewer")
    return found, notes


def _fits(module: Any, tied: Mapping[str, str], solution: Solution, unit: Unit,
          count: int) -> bool:
    choices = {}
    for group in unit.groups:
        table = np.zeros(group.shape, dtype=bool)
        table[..., :count] = True
        choices[group.atom] = Choice(table, group.outers)
    try:
        uniform_config(module, solution, choices, pruned_shapes(module, tied, solution, choices))
    except SpaError:
        return False
    return True
