"""How a proof is judged: its bounds, and the control that it must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from ..axes.choices import Choice, Choices
from ..evidence.slots import powers
from ..groups.solution import Solution
from .comparison import compare, tensors
from .tolerances import CONTROL, CONTROL_FACTOR, PROOF

CONTROLS = 8


@dataclass(frozen=True, slots=True)
class Proof:
    """Relative errors: `error` of the pruned program, `control` with one index swapped.

    `precision` says what it was computed in, `tolerance` what rounding may do there; `redrawn`,
    that the control is of weights drawn anew, as no index matters to the given ones.
    """

    error: float
    control: float | None
    swapped: str = ""
    approximate: float | None = None
    precision: str = "float64"
    tolerance: float = PROOF.value
    redrawn: bool = False

    @property
    def holds(self) -> bool:
        """True if the pruned model is right and the control shows that a wrong one is caught."""
        return self.error <= self.tolerance and (
            self.control is None or self.control >= needed(self.tolerance))


def needed(tolerance: float) -> float:
    """Return the least by which a control must show, where rounding may do `tolerance`."""
    return max(CONTROL.value, CONTROL_FACTOR.value * tolerance)


def relative_error(got: object, want: object) -> float:
    """Return the relative error of nested results (see `comparison`); inf where shapes differ.

    Python's whole numbers in them do not count: they are sizes.
    """
    return compare(tensors(got), tensors(want)).relative


def swap(stored: Callable[[str], torch.Tensor], solution: Solution, choices: Choices,
         seed: int, attempt: int = 0) -> tuple[str, dict[str, Choices]]:
    """Give one array a wrong index: its largest kept slice for a removed one.

    Later attempts take the next largest: inputs may reach no place that reads the first, as an
    expert that no token goes to. `stored` gives an array by its name. Returns the array's name
    and the choices that it is to be sliced by.
    """
    rng = np.random.default_rng(seed)
    groups = [g for g in solution.groups.values() if g.atom in choices and g.reads]
    group = groups[int(rng.integers(len(groups)))]
    graph = solution.graph.weights()
    order = sorted(group.members, key=lambda m: (m.role != "producer",
                                                 -prod(graph[m.weight].shape)))
    for member in order:  # in an array of equal slices a wrong index changes nothing
        norms = powers(stored(member.weight), solution.dims(member.weight), member.dim, group,
                       2)[0].sqrt().numpy()
        if np.ptp(norms) > 0:
            break
    table = choices[group.atom].table.copy()
    flat = table.reshape(-1, group.size)
    norms = norms.reshape(-1, group.size) if flat.shape[0] > 1 else \
        norms.reshape(-1, group.size).sum(0, keepdims=True)
    for row, norm in zip(flat, norms, strict=True):
        removed = rng.choice(np.flatnonzero(~row))
        largest = np.argsort(np.where(row, -norm, np.inf), kind="stable")
        row[largest[attempt % row.sum()]] = False
        row[removed] = True
    changed = {**choices, group.atom: Choice(table, choices[group.atom].outers)}
    return member.weight, {member.weight: changed}
