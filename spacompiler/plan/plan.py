"""A plan: which slices of which group stay. Plain data, JSON, re-applicable to the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from ..axes.choices import Choice, Choices, kept_size
from ..axes.expressions import Atom
from ..errors import SpaError
from ..groups.cost import ITEM_BYTES, cost
from ..groups.solution import Group, Solution
from ..request.targets import METRICS
from ..store import strict_json
from ..store.forms import FORMS


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """`kept` holds, per group, the indices that stay (a nest of lists where it is fibred).

    `weights_hash` is the hash of the dense weights that the plan was made for.
    """

    kept: dict[str, Any]
    sizes: dict[str, int]
    target: str = ""
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    weights_hash: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """A line on what it is for; `to_json` says which slices stay."""
        return f"<Plan: {self.target or 'no target'}, {len(self.kept)} groups become smaller>"

    def to_json(self) -> str:
        """Return the text of plan.json, keys in order."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps(said, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan; raises SpaError if it is none."""
        data = strict_json.parse(text, FORMS["plan.json"], "plan.json")
        try:
            return Plan(**data)
        except TypeError as problem:
            raise SpaError("plan.json cannot be read", why=str(problem)) from problem

    @staticmethod
    def read(folder: Path) -> Plan:
        """Read an artifact's plan; raises SpaError if there is none."""
        try:
            return Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise SpaError("plan.json cannot be read", where=str(folder),
                           why=str(problem)) from problem

    def choices(self, solution: Solution) -> Choices:
        """Return the plan as choices over a solution's atoms.

        Raises SpaError if the plan names a group that the solution lacks, or another size.
        """
        made: dict[Atom, Choice] = {}
        for name, kept in self.kept.items():
            group = solution.groups.get(name)
            try:
                if group is None or group.size != self.sizes[name]:
                    raise ValueError("no group of that name has that size")
                table = _table(group, kept)
            except (LookupError, ValueError) as problem:
                raise SpaError(
                    f"the plan's group {name} is not one of this model",
                    why="it was made for another model or another version of this one",
                    fix="apply a plan to the model that it was made for") from problem
            made[group.atom] = Choice(table, group.outers if _nested(kept) else ())
        return made


def _nested(kept: Sequence[object]) -> bool:
    return bool(kept) and isinstance(kept[0], list)


def _table(group: Group, kept: Sequence[object]) -> np.ndarray:
    table = np.zeros(group.shape if _nested(kept) else (group.size,), dtype=bool)
    if not _nested(kept):
        table[np.asarray(kept, dtype=int)] = True
        return table
    lists = np.asarray(kept, dtype=int)
    rows = table.reshape(-1, group.size)
    for row, keep in zip(rows, lists.reshape(len(rows), -1), strict=True):
        row[keep] = True
    return table


def select(group: Group, score: np.ndarray, count: int) -> Any:
    """Return the `count` best slices of a group, ascending, as (nested) lists of indices.

    Ties go to the lower index, so that equal scores give equal plans.
    """
    rows = score.reshape(-1, group.size)
    best = np.sort(np.argsort(-rows, axis=-1, kind="stable")[:, :count], axis=-1)
    return best.reshape(*group.shape[:-1], count).tolist()


class Facts(TypedDict, total=False):
    """What a plan says of itself beside what it keeps."""

    target: str
    costs: dict[str, dict[str, int]]
    weights_hash: str
    recipe: dict[str, Any]


def make_plan(groups: Iterable[Group], scores: Mapping[str, np.ndarray],
              counts: Mapping[str, int], **facts: Unpack[Facts]) -> Plan:
    """Return the plan that keeps the best slices of each group that shrinks."""
    shrinking = [g for g in groups if counts[g.name] < g.size]
    return Plan({g.name: select(g, scores[g.name], counts[g.name]) for g in shrinking},
                {g.name: g.size for g in shrinking}, **facts)


def widths(solution: Solution, choices: Choices) -> list[tuple[str, tuple[int, ...],
                                                               tuple[int, ...]]]:
    """Return (array, dense shape, pruned shape) for every stored array that changes."""
    rows = []
    for name, dims in solution.weights().items():
        before = tuple(e.size for e in dims)
        after = tuple(kept_size(e, choices) for e in dims)
        if before != after:
            rows.append((name, before, after))
    return rows


def costs(solution: Solution, choices: Choices,
          whole: Mapping[str, int] | None = None,
          more: Iterable[tuple[str, int]] = ()) -> dict[str, dict[str, int]]:
    """Return {metric: {dense, pruned}} for what reports count and `more`, (metric, tokens);
    `whole` are the costs of the dense network where it has blocks that the solution's lacks."""
    found = {}
    for metric, tokens in (*((m, 0) for m in METRICS), *more):
        price = cost(solution, metric, tokens)
        dense = (whole or {}).get(metric, price.total)
        pruned = price.set({atom: choice.count for atom, choice in choices.items()})
        found[metric] = {"dense": dense, "pruned": pruned}
    return found


def pruned_bytes(solution: Solution, choices: Choices) -> dict[str, int]:
    """Return bytes of all stored arrays, dense and pruned."""
    total = {"dense": 0, "pruned": 0}
    kinds = {w: t.dtype for w, t in solution.graph.weights().items()}
    for name, dims in solution.weights().items():
        item = ITEM_BYTES.get(kinds[name], 4)
        dense = pruned = item
        for e in dims:
            dense, pruned = dense * e.size, pruned * kept_size(e, choices)
        total["dense"] += dense
        total["pruned"] += pruned
    return total
