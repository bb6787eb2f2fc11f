"""The allocation problem: units that keep a number of slices, legal counts, a cost to meet."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from .axes import Atom, walk
from .cost import Cost
from .errors import TargetError, UsageError
from .groups import Group, Solution, beside
from .settling import settle

if TYPE_CHECKING:
    from .measure import Measure

TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Unit:
    """Groups that must keep the same number of slices (usually one; a family if uniform).

    `legal` are the counts that may be kept, ascending, the last one the full size; `losses[k]`
    is what is lost when k slices are kept: the error curve that allocation passes go by (a share
    of the groups' importance, or the importance itself where criteria say it is comparable).
    `chosen` is how many of them a router takes: so many stay, whatever the floor.
    """

    name: str
    groups: tuple[Group, ...]
    legal: tuple[int, ...]
    losses: np.ndarray
    chosen: int = 0

    @property
    def size(self) -> int:
        return self.legal[-1]

    def counts(self, kept: int) -> dict[Atom, int]:
        return {group.atom: kept for group in self.groups}

    def nearest(self, wanted: float) -> int:
        return min(self.legal, key=lambda k: (abs(k - wanted), k))


@dataclass(slots=True)
class Problem:
    """Units, the cost of keeping them, and the cost to meet (absolute, with a tolerance).

    `measure` makes measurements on the network, for passes that ask for them.
    """

    units: tuple[Unit, ...]
    cost: Cost
    target: float
    dense: int
    metric: str = "params"
    tolerance: float = field(default=TOLERANCE)
    measure: Measure | None = None

    def price(self, kept: Mapping[str, int]) -> int:
        """Return the cost of a choice of counts."""
        counts: dict[Atom, int] = {}
        for unit in self.units:
            counts |= unit.counts(kept[unit.name])
        return self.cost.set(counts)

    def full(self) -> dict[str, int]:
        return {unit.name: unit.size for unit in self.units}

    def least(self) -> dict[str, int]:
        return {unit.name: unit.legal[0] for unit in self.units}

    def met(self, kept: Mapping[str, int]) -> bool:
        return abs(self.price(kept) - self.target) <= self.tolerance * self.dense


def refine(problem: Problem, kept: dict[str, int]) -> dict[str, int]:
    """Move units by legal steps while that brings the cost nearer to the target.

    Where single steps get stuck short of the tolerance, a coarse unit is moved first and the
    others settle around it.
    """
    kept = settle(problem, kept)
    coarse = sorted((u for u in problem.units if len(u.legal) > 1),
                    key=lambda u: -abs(problem.cost.change(u.counts(u.legal[-2]))))[:8]
    for unit in coarse:
        if problem.met(kept):
            break
        for by in (1, -1):
            at = unit.legal.index(kept[unit.name]) + by
            if 0 <= at < len(unit.legal):
                other = settle(problem, {**kept, unit.name: unit.legal[at]}, but=unit.name)
                if _miss(problem, other) < _miss(problem, kept):
                    kept = other
    problem.price(kept)
    return kept


def _miss(problem: Problem, kept: Mapping[str, int]) -> float:
    return abs(problem.price(kept) - problem.target)


def check_met(problem: Problem, kept: Mapping[str, int], *, finest: bool = False) -> None:
    """Raise TargetError, naming what binds, if the target is missed by more than a point.

    `finest` says that steps cannot be asked to be smaller.
    """
    if problem.met(kept):
        return
    price, least = problem.price(kept), problem.price(problem.least())
    share, floor = price / problem.dense, least / problem.dense
    if least > problem.target:
        bound = [u.name for u in problem.units if len(u.legal) > 1][:3]
        why = (f"with every unit at its floor, {floor:.1%} of {problem.metric} remain: "
               f"{len(problem.units)} units may shrink, e.g. {', '.join(bound) or 'none'}")
        routed = next((u for u in problem.units if u.chosen and u.legal[0] == u.chosen), None)
        if routed is not None:
            why += f"; a router takes {routed.chosen} of {routed.name}, so that as many stay"
        fix = "lower the floor, or let more go: --role, --only, --ignore"
    else:
        steps = [u for u in problem.units if len(u.legal) > 1]
        coarse = max(steps, key=lambda u: u.legal[-1] - u.legal[-2], default=None)
        by = coarse.legal[-1] - coarse.legal[-2] if coarse else 1
        why = f"the nearest that could be reached is {share:.1%}" + (
            f": {coarse.name} moves in steps of {by} of {coarse.size}" if coarse else "")
        fix = "use --align 1 for finer steps, or a target near that" if by > 1 and not finest \
            else "take a target near that, or let more go: --role, --only, --ignore"
    problem.price(kept)
    raise TargetError(
        f"target {problem.metric}={problem.target / problem.dense:.1%} cannot be met",
        why=why, fix=fix)


# --- which groups may go, and in which steps --------------------------------------------------


def candidates(solution: Solution, *, roles: Sequence[str], only: Sequence[str] = (),
               ignore: Sequence[str] = (), approximate: bool = False) -> list[Group]:
    """Return the groups that may shrink.

    `only` and `ignore` are shell patterns over group names and arrays: a group is chosen by
    `only` if its name or all of its arrays match (roles do not count then), and stays by
    `ignore` if its name or any of its arrays does. Raises UsageError if a pattern matches nothing.
    """
    for pattern in (*only, *ignore):
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
    """Return the options of the command line that could each let more go than `candidates`."""
    if not solution.groups:
        return []
    asked: dict[str, Any] = {"roles": roles, "only": only, "ignore": ignore,
                             "approximate": approximate}
    widest: dict[str, dict[str, Any]] = {
        "--role": {"roles": {g.role for g in solution.groups.values()}},
        "--only": {"only": ["*"]}, "--approximate": {"approximate": True},
        "fewer --ignore": {"ignore": ()}}
    now = len(candidates(solution, **asked))
    return [name for name, change in widest.items()
            if len(candidates(solution, **{**asked, **change})) > now]


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


def family(name: str) -> str:
    """Return a group's name with list indices masked: repeated blocks share it.

    >>> family("model.layers.12.mlp.up_proj.weight:0")
    'model.layers.*.mlp.up_proj.weight:0'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def units(solution: Solution, groups: Sequence[Group], scores: Mapping[str, np.ndarray], *,
          uniform: bool, align: int | None, lanes: int, floor: float,
          absolute: bool = False) -> tuple[Unit, ...]:
    """Build the units of an allocation problem, one per group or per family.

    With `absolute`, error curves are sums of scores, not shares of each group's total.
    """
    bundles: dict[str, list[Group]] = {}
    for group in groups:
        bundles.setdefault(family(group.name) if uniform else group.name, []).append(group)
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
        made.append(Unit(name, tuple(bundle), legal, losses, chosen))
    return tuple(made)


def join(parts: Sequence[Unit]) -> Unit:
    """Return one unit of several that must keep the same count."""
    legal = set(parts[0].legal).intersection(*(u.legal for u in parts))
    return Unit(" & ".join(u.name for u in parts), tuple(g for u in parts for g in u.groups),
                tuple(sorted(legal)), np.sum([u.losses for u in parts], axis=0),
                max(u.chosen for u in parts))


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
