"""Which slices of the dense model are still there, and plans relative to what is there now.

Tables are kept in the dense model's coordinates however often the model shrinks, so that a
checkpoint can say what it is a part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spacompiler.axes.choices import Choice, Choices
from spacompiler.axes.expressions import Atom
from spacompiler.errors import SpaError
from spacompiler.groups.solution import Group, Solution

Tables = dict[str, np.ndarray]


@dataclass(frozen=True)
class Kept:
    """Per group a table of `group.shape` (dense): True where the slice is still there."""

    solution: Solution
    tables: Mapping[str, np.ndarray]

    def table(self, name: str) -> np.ndarray:
        """Return a group's table; all True if nothing of it went."""
        have = self.tables.get(name)
        return np.ones(self.solution.groups[name].shape, dtype=bool) if have is None else have

    def count(self, name: str) -> int:
        """Return how many slices a group keeps (inside each outer slice)."""
        rows = self.rows(name)
        return int(rows.sum(1).max())

    def choices(self) -> Choices:
        """Return what went from the dense model."""
        return {group.atom: Choice(table, group.outers) for name, table in self.tables.items()
                if not table.all() for group in (self.solution.groups[name],)}

    def rows(self, name: str, of: np.ndarray | None = None) -> np.ndarray:
        """Return (outer slices still there, slices) of a group's table (or of another array)."""
        group = self.solution.groups[name]
        array = self.table(name) if of is None else of
        return array.reshape(-1, group.size)[self._outer(group).reshape(-1)]

    def relative(self, later: Kept, current: Solution) -> Choices:
        """Return what goes from `self` to `later`, over the atoms of the model as it is now."""
        made: dict[Atom, Choice] = {}
        for name in later.tables:
            old, new = self.rows(name), self.rows(name, later.table(name))
            if (new & ~old).any():
                raise SpaError(f"slices of {name} cannot come back", why="they were removed")
            if (old & ~new).any():
                group = current.groups[name]
                made[group.atom] = Choice(new[old].reshape(group.shape), group.outers)
        return made

    def scatter(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return values over what is there now as an array of the dense shape, else zero."""
        group = self.solution.groups[name]
        dense = np.zeros((int(np.prod(group.shape[:-1], initial=1)), group.size))
        rows = dense[self._outer(group).reshape(-1)]
        rows[self.rows(name)] = values.reshape(-1)
        dense[self._outer(group).reshape(-1)] = rows
        return dense.reshape(group.shape)

    def _outer(self, group: Group) -> np.ndarray:
        """Which coordinates of the outer axes are still there: bool, (*outer sizes)."""
        at = np.indices(group.shape[:-1])
        mask = np.ones(group.shape[:-1], dtype=bool)
        groups = self.solution.by_atom()
        for i, atom in enumerate(group.outers):
            outer = groups.get(atom)
            if outer is not None and outer.name in self.tables:
                beside = [at[group.outers.index(o)] for o in outer.outers]
                mask &= self.tables[outer.name][(*beside, at[i])]
        return mask

    def as_plain(self) -> dict[str, Any]:
        """Return the kept indices per group, as `Plan.kept` holds them, and the dense sizes."""
        return {name: {"shape": list(table.shape),
                       "removed": np.flatnonzero(~table).tolist()}
                for name, table in self.tables.items() if not table.all()}

    def read(self, plain: Mapping[str, Any]) -> Kept:
        """Return the tables that `as_plain` wrote; raises SpaError if they are of another model."""
        tables: Tables = {}
        for name, entry in plain.items():
            group = self.solution.groups.get(name)
            if group is None or list(group.shape) != entry["shape"]:
                raise SpaError(f"the saved group {name} is not one of this model",
                               why="the state was saved for another model",
                               fix="build the dense model that the run started from")
            flat = np.ones(int(np.prod(group.shape)), dtype=bool)
            flat[np.asarray(entry["removed"], dtype=int)] = False
            tables[name] = flat.reshape(group.shape)
        return Kept(self.solution, tables)


def lowest_out(kept: Kept, group: Group, score: np.ndarray, count: int) -> np.ndarray:
    """Return a table that keeps the `count` best slices of those still there (dense shape).

    Ties go to the lower index; what went stays out.
    """
    flat = np.where(kept.table(group.name), score, -np.inf).reshape(-1, group.size)
    best = np.argsort(-flat, axis=-1, kind="stable")[:, :count]
    table = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(table, best, True, axis=-1)
    return table.reshape(group.shape)
