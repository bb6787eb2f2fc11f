"""The allocation problem: units that keep a number of slices, legal counts, a cost to meet."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import gcd, prod
from typing import Any

import numpy as np

from ..axes.expressions import walk
from ..errors import UsageError
from ..groups.fibres import beside
from ..groups.repeats import family
from ..groups.solution import Group, Solution
from ..request.wishes import Wish
from .pieces import leads
from .problem import Unit

# --- which groups may go, and in which steps --------------------------------------------------


def candidates(solution: Solution, *, roles: Sequence[str], only: Sequence[str] = (),
               ignore: Sequence[str] = (), approximate: bool = False,
               wished: Sequence[str] = ()) -> list[Group]:
    """Return the groups that may shrink.

    `only` and `ignore` are shell patterns over group names and arrays: a group is chosen by
    `only` if its name or all of its arrays match (roles do not count then), and stays by
    `ignore` if its name or any of its arrays does; `wished` are patterns of wishes.
    Raises UsageError if a pattern matches nothing.
    """
    for pattern in (*only, *ignore, *wished):
        if not any(_touches(group, [pattern]) for group in solution.groups.values()):
            known = ", ".join(list(solution.groups)[:4])
            raise UsageError(f"pattern {pattern!r} matches no group or parameter",
                             fix=f"groups are named like {known}")
    chosen = []
    for group in solution.groups.values():
        wanted = _lies_in(group, only) if only else group.role in roles
        if wanted and not _touches(group, ignore):
            if group.approximate and not (approximate or only):
                continue
            chosen.append(group)
    return chosen


def openings(solution: Solution, *, roles: Sequence[str], only: Sequence[str],
             ignore: Sequence[str], approximate: bool) -> list[str]:
    """Return the options of the command line that let more go than `candidates`, the fewest.

    Each entry is one way: one option, or several where only together they let anything go.
    """
    asked: dict[str, Any] = {"roles": roles, "only": only, "ignore": ignore,
                             "approximate": approximate}
    others = sorted({g.role for g in solution.groups.values()} - set(roles))
    wider: dict[str, dict[str, Any]] = {
        " ".join(f"--role {r!r}" if " " in r else f"--role {r}" for r in others):
            {"roles": (*roles, *others), "only": ()},
        "--approximate": {"approximate": True}, "other --only": {"only": ()},
        "fewer --ignore": {"ignore": ()}}
    now = len(candidates(solution, **asked))
    for count in range(1, len(wider) + 1):
        found = [" ".join(names) for names in combinations(wider, count)
                 if all(names) and len(candidates(solution, **asked | {
                     k: v for name in names for k, v in wider[name].items()})) > now]
        if found:
            return found
    return []


def why_none(solution: Solution, *, roles: Sequence[str], only: Sequence[str],
             ignore: Sequence[str], approximate: bool) -> str:
    """Say, by reason, why no group is a candidate."""
    counts: Counter[str] = Counter()
    for group in solution.groups.values():
        if not (_lies_in(group, only) if only else group.role in roles):
            counts["not chosen by --only" if only else f"of role {group.role}, not asked for"] += 1
        elif _touches(group, ignore):
            counts["kept by --ignore"] += 1
        else:
            counts["under a norm that would take other statistics (needs --approximate)"] += 1
    found = len(solution.groups)
    return f"groups found: {found}" + "".join(
        f"; {number} {reason}" for reason, number in counts.items()) + _unknown(solution)


def _unknown(solution: Solution) -> str:
    """Which operators freeze what they touch because no row knows them, by name and place."""
    names = list(dict.fromkeys(node.title() for node in solution.solver.opaque))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; unknown operators keep what they touch: {', '.join(names[:3])}{more}" \
        if names else ""


def _match(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def _touches(group: Group, patterns: Sequence[str]) -> bool:
    return _match(group.name, patterns) or any(_match(m.weight, patterns) for m in group.members)


def _lies_in(group: Group, patterns: Sequence[str]) -> bool:
    return _match(group.name, patterns) or all(_match(m.weight, patterns) for m in group.members)


def step(solution: Solution, group: Group, align: int | None, lanes: int) -> int:
    """Return the multiple in which a group's count may change.

    With `align=None` (auto) array widths stay multiples of what the CPU's blocked kernels want:
    `lanes` for convolutions, 8 for matrix products; small groups use smaller steps. A factor
    beside the group in a dimension (heads x dims) already counts toward the multiple. What a
    kernel demands holds whatever `align` says.
    """
    kernel = max((k for e, k in solution.solver.multiples if group.atom in walk(e)), default=1)
    if align is None and group.role not in ("channel", "hidden"):
        return kernel
    ranks = [len(solution.dims(m.weight)) for m in group.members]
    wanted = align or (lanes if max(ranks) > 2 else 8)
    if align is None and group.size < 2 * wanted:
        wanted = 8 if group.size >= 16 else max(1, 1 << (max(group.size // 4, 1).bit_length() - 1))
    multiples = [kernel]
    for member in group.members:
        for atom, outside, inside in beside(solution.dims(member.weight)[member.dim]):
            if atom is group.atom:
                others = prod(a.size for a in outside | inside)
                multiples.append(wanted // gcd(wanted, others))
    return max(multiples)


def fewest(solution: Solution, group: Group) -> int:
    """Return how many slices must stay: as many experts as a router takes; 0 where none does."""
    return max((k for e, k in solution.solver.least if e is group.atom), default=0)


def legal_counts(size: int, multiple: int, floor: float, fewest: int = 0) -> tuple[int, ...]:
    """Multiples of `multiple` up to `size`, from the floor: a share of it, at least `fewest` and 1.

    >>> legal_counts(40, 16, 0.0)
    (16, 32, 40)
    """
    least = max(1, fewest, int(np.ceil(floor * size)))
    counts = {k for k in range(multiple, size + 1, multiple) if k >= least}
    return tuple(sorted(counts | {size}))


def units(solution: Solution, groups: Sequence[Group], scores: Mapping[str, np.ndarray], *,
          uniform: bool, align: int | None, lanes: int, floor: float,
          absolute: bool = False) -> tuple[Unit, ...]:
    """Build the units of an allocation problem, one per group or per family.

    Pieces of one split are one unit. With `absolute`, error
    curves are sums of scores, not shares of each group's total.
    """
    bundles: dict[str, list[Group]] = {}
    first: dict[Any, str] = {}
    lead = leads(solution)
    for group in groups:
        name = first.setdefault(lead.get(group.atom, group.atom), group.name)
        bundles.setdefault(family(name) if uniform else name, []).append(group)
    made: list[Unit] = []
    for name, bundle in bundles.items():
        sizes = {g.size for g in bundle}
        if len(sizes) > 1:
            made.extend(units(solution, bundle, scores, uniform=False, align=align, lanes=lanes,
                              floor=floor, absolute=absolute))
            continue
        multiple = max(step(solution, g, align, lanes) for g in bundle)
        chosen = max(fewest(solution, g) for g in bundle)
        legal = legal_counts(bundle[0].size, multiple, floor, chosen)
        losses = np.sum([_losses(scores[g.name], absolute) for g in bundle], axis=0)
        levels = np.mean([_levels(scores[g.name]) for g in bundle], axis=0)
        made.append(Unit(name, tuple(bundle), legal, losses, chosen, levels))
    return tuple(made)


def under(units: Sequence[Unit], wishes: Sequence[Wish]) -> tuple[Unit, ...]:
    """Return the units with the counts that wishes leave; raises UsageError where that is none."""
    return tuple(replace(u, legal=wished(u.groups, u.legal, wishes)) for u in units)


def wished(groups: Sequence[Group], legal: tuple[int, ...],
           wishes: Sequence[Wish]) -> tuple[int, ...]:
    """Return the counts that wishes for any of these groups leave, of each wish in turn.

    Raises UsageError where two leave none together.
    """
    for wish in wishes:
        if any(_touches(group, [wish.pattern]) for group in groups):
            left = wish.of(legal, groups[0].size)
            if not left:
                raise UsageError(f"wishes for {groups[0].name} leave no count that may be kept",
                                 fix=f"leave one out; the last one is {wish.pattern}")
            legal = left
    return legal


def _levels(score: np.ndarray) -> np.ndarray:
    """Scores, highest first; the mean over outer slices of those that go together.

    >>> _levels(np.array([[1.0, 3.0], [2.0, -4.0]])).tolist()
    [2.5, -1.5]
    """
    flat = np.sort(score.reshape(-1, score.shape[-1]).astype(float), axis=-1)
    return np.asarray(flat[:, ::-1].mean(0))


def _losses(score: np.ndarray, absolute: bool = False) -> np.ndarray:
    """Share of a group's total score lost when its k best slices are kept, for k = 0 … n.

    >>> _losses(np.array([3.0, 1.0]), absolute=True).tolist()
    [4.0, 1.0, 0.0]
    """
    flat = np.sort(score.reshape(-1, score.shape[-1]), axis=-1)[:, ::-1].astype(float)
    flat = flat - min(flat.min(), 0.0)
    total = flat.sum() or 1.0
    kept = np.concatenate([[0.0], np.cumsum(flat.sum(0))])
    return total - kept if absolute else 1.0 - kept / total
