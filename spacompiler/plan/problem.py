"""What an allocation pass decides: units, budget, floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from ..axes.expressions import Atom
from ..errors import TargetError
from ..groups.cost import Cost
from ..groups.solution import Group

MISS = 0.01
"""What a plan may miss its target by, as a share of the dense cost."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Groups that must keep the same number of slices (usually one; a family if uniform).

    `legal` are the counts that may be kept, ascending, the last one the full size (unless a wish
    says less); `losses[k]`
    is what is lost when k slices are kept: the error curve that allocation passes go by (a share
    of the groups' importance, or the importance itself where criteria say it is comparable).
    `levels` are the scores themselves, highest first (size,): a mean over groups and outer slices.
    `chosen` is how many of them a router takes: so many stay, whatever the floor.
    """

    name: str
    groups: tuple[Group, ...]
    legal: tuple[int, ...]
    losses: np.ndarray
    chosen: int = 0
    levels: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def size(self) -> int:
        """The number of slices of the dense network."""
        return self.groups[0].size

    def counts(self, kept: int) -> dict[Atom, int]:
        """Return the count of each group that `kept` slices of the unit mean."""
        return {group.atom: kept for group in self.groups}

    def nearest(self, wanted: float) -> int:
        """Return the legal count next to a number of slices, the lower of two."""
        return min(self.legal, key=lambda k: (abs(k - wanted), k))


class Measured(Protocol):
    """Measurements on the network that an allocation pass may ask for."""

    def blocks(self, problem: Problem, kept: Mapping[str, int] | None = None) -> dict[
            str, tuple[float, float]]:
        """Return (mean angle / pi, mean cosine) of hidden states around each unit's block, in the
        dense network or under counts `kept`."""

    def slopes(self, problem: Problem, *, step: float, examples: int,
               seed: int = 0) -> dict[str, tuple[float, int, tuple[str, ...]]]:
        """Return, by block, its slope by forward passes, its size, and the units in it."""

    def fidelity(self, problem: Problem, kept: Mapping[str, int],
                 batches: int) -> tuple[float, float, int]:
        """Return how often the likeliest class is the dense network's under counts `kept`, masked
        and repaired (a share), the divergence from it, and of how many rows."""

    def distortion(self, problem: Problem, kept: Mapping[str, int], batches: int) -> float:
        """Return the mean squared change of the results under counts `kept`."""

    def renewed(self, problem: Problem, kept: Mapping[str, int], batches: int) -> float:
        """Return the loss under counts `kept`, batch norms by the batches that they see."""

    @property
    def batches(self) -> Sequence[Any]:
        """The batches of the calibration."""

    def lost(self, problem: Problem, kept: Mapping[str, int], batches: int,
             skip: int = 0) -> float:
        """Return the divergence of the masked network from the dense one under counts `kept`.

        A mean over the first `batches` but for `skip`.
        """

    def glances(self, problem: Problem, plans: Sequence[Mapping[str, int]]) -> list[float]:
        """Return the same for some counts on one example, or nan where that would say little."""

    def few(self, most: int, positions: int) -> int:
        """Return how many batches hold so many positions (examples, or tokens), or `most`."""

    def diverges(self, problem: Problem, kept: Mapping[str, int], batches: int,
                 skip: int = 0) -> float:
        """Return the same of the network as it is repaired, where there is a repair."""

    def changes(self, problem: Problem, kept: Mapping[str, int],
                moves: Mapping[str, Sequence[int]], batches: int) -> Any:
        """Return what moving single units does to results under the counts `kept`."""


@dataclass(slots=True)
class Limit:
    """A cost and what may stay of it, beside the target: all limits of a request hold at once."""

    metric: str
    cost: Cost
    amount: float
    dense: int

    def price(self, problem: Problem, kept: Mapping[str, int]) -> int:
        """Return the cost of a choice of counts."""
        counts: dict[Atom, int] = {}
        for unit in problem.units:
            counts |= unit.counts(kept[unit.name])
        return self.cost.set(counts)

    @property
    def left(self) -> float:
        """What may still be added to the counts that were priced last."""
        return self.amount - self.cost.total

    @property
    def over(self) -> float:
        """By what share of the dense cost the counts that were priced last go beyond it."""
        return -self.left / self.dense


@dataclass(slots=True)
class Problem:
    """Units, the cost of keeping them, and the cost to meet (absolute, with a tolerance).

    `measure` makes measurements on the network, for passes that ask for them; `closest` says that
    whatever is nearest to the target will do; `notes` is what a pass has to tell the user;
    `shapes` are those of stored arrays, by name. `losses` says what the units' are: exact (sums of
    scores that are losses), comparable (scores are estimates of the loss), or unlike (scores of
    the `criterion` are in no unit that groups share); `on_data` whether batches are real ones.
    Counts that diverge from the dense network by more than `bound` on the first batch are no use.
    `limits` are others that are to hold too: passes that look at them find counts under all,
    others may miss them, which is seen afterwards.
    """

    units: tuple[Unit, ...]
    cost: Cost
    target: float
    dense: int
    metric: str = "params"
    tolerance: float = field(default=MISS)
    measure: Measured | None = None
    notes: list[str] = field(default_factory=list)
    closest: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    losses: str = "exact"
    criterion: str = ""
    on_data: bool = True
    bound: float = float("inf")
    limits: tuple[Limit, ...] = ()

    def holds(self, kept: Mapping[str, int]) -> bool:
        """True if no limit beside the target is broken, within the tolerance."""
        return all(limit.price(self, kept) <= limit.amount + self.tolerance * limit.dense
                   for limit in self.limits)

    def price(self, kept: Mapping[str, int]) -> int:
        """Return the cost of a choice of counts."""
        counts: dict[Atom, int] = {}
        for unit in self.units:
            counts |= unit.counts(kept[unit.name])
        return self.cost.set(counts)

    def full(self) -> dict[str, int]:
        """Return the highest legal count of each unit: the dense network's, but for wishes."""
        return {unit.name: unit.legal[-1] for unit in self.units}

    def least(self) -> dict[str, int]:
        """Return the lowest legal count of each unit."""
        return {unit.name: unit.legal[0] for unit in self.units}

    def met(self, kept: Mapping[str, int]) -> bool:
        """True if a choice costs the target, within the tolerance (a share of the dense cost).

        Or if it costs less, where all limits hold and one of them leaves no more.
        """
        miss = self.price(kept) - self.target
        if abs(miss) <= self.tolerance * self.dense:
            return True
        return miss < 0 and self.holds(kept) and any(
            limit.over >= -self.tolerance for limit in self.limits)


def check_met(problem: Problem, kept: Mapping[str, int], *, finest: bool = False) -> None:
    """Raise TargetError, naming what binds, if the target is missed by more than a point.

    `finest` says that steps cannot be asked to be smaller. Where whatever is closest will do, only
    a network that would stay whole is an error.
    """
    if problem.met(kept):
        return
    if problem.closest and problem.price(kept) < problem.price(problem.full()):
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
        near = f"take what is nearest: --target '{problem.metric}~" \
               f"{problem.target / problem.dense:.4g}'; or "
        fix = ("let less stay, or " if problem.closest else near) + (
            "use --align 1 for finer steps" if by > 1 and not finest
            else "let more go: --role, --only, --ignore")
    problem.price(kept)
    raise TargetError(
        f"target {problem.metric}={problem.target / problem.dense:.1%} cannot be met",
        why=why, fix=fix)


def join(parts: Sequence[Unit]) -> Unit:
    """Return one unit of several that must keep the same count."""
    legal = set(parts[0].legal).intersection(*(u.legal for u in parts))
    return Unit(" & ".join(u.name for u in parts), tuple(g for u in parts for g in u.groups),
                tuple(sorted(legal)), np.sum([u.losses for u in parts], axis=0),
                max(u.chosen for u in parts), np.mean([u.levels for u in parts], axis=0))


class Allocation(Protocol):
    """Decide how many slices each unit keeps.

    A pass may say `by_layer = True`: it goes layer by layer, and is given layers that may differ
    where a layout can say that. Or `alike = True`: it makes them alike, given the choice.
    """

    name: ClassVar[str]

    def allocate(self, problem: Problem) -> dict[str, int]:
        """Return kept slices by unit name; each must be legal for its unit."""
