"""Search: sub-networks that meet every limit, evolved by what each does to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from random import Random
from typing import ClassVar

from spacompiler.errors import SpaError
from spacompiler.passes.dynamic import Dynamic
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.passes.standardised import Standardised
from spacompiler.passes.uniform import Uniform
from spacompiler.plan.fitting import fitted, priced
from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import refine

Kept = dict[str, int]


@dataclass(frozen=True)
class Search:
    """Evolve counts under all limits at once, by the measured divergence from the dense network.

    It starts from uniform counts, one ranking, the exact optimum on curves of scores (dynamic
    programming), and, under several limits, the optima at several mixes of their prices. In each
    generation every one of `offspring` takes one of the `parents` best, moves `moves` pairs of
    units, one down, one up, by up to `reach` of their size, and is fitted to the limits again. All
    are judged on the first of `batches` alone, the best of them on all: a candidate costs one
    masked forward pass, of the repaired network where there is a repair, whose solutions are kept
    for counts that come again. As Once-for-All (ICLR 2020) and Puzzletron search, without
    training; `--drop-blocks auto` searches over depth around it, and `once-for-all` trains first.
    """

    name: ClassVar[str] = "search"
    by_layer: ClassVar[bool] = True
    use: ClassVar[str] = "several limits at once, or quality beyond one-shot curves"
    tags: ClassVar[tuple[str, ...]] = ("after", "measured", "widths", "search")
    generations: int = 6
    offspring: int = 12
    parents: int = 4
    moves: int = 2
    reach: float = 1 / 6
    batches: int = 4
    repaired: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.generations, self.offspring, self.parents, self.moves, self.batches)
        if min(counts) < 1 or not 0 < self.reach <= 1:
            raise TypeError("generations, offspring, parents, moves, batches at least 1; reach "
                            "above 0, at most 1")

    def allocate(self, problem: Problem) -> Kept:
        """Return kept slices by unit: those of the least divergence that was found."""
        if problem.measure is None:
            raise SpaError("search needs a torch module and calibration data",
                           fix="use --allocation global")
        draws, judge = Random(self.seed), _Judge(problem, self.batches, self.repaired)
        starts = dict(_starts(problem))
        if not starts:
            return GlobalRanking().allocate(problem)  # whose miss says what binds
        pool = judge.best(starts.values(), self.parents)
        first = judge.known[_key(pool[0])]
        for _ in range(self.generations):
            made = [_child(problem, draws.choice(pool), draws, self.moves, self.reach)
                    for _ in range(self.offspring)]
            pool = judge.best([*pool, *(m for m in made if m is not None)], self.parents)
        last = judge.known[_key(pool[0])]
        begun = next((n for n, kept in starts.items() if kept == pool[0]), "a descendant")
        problem.notes.append(
            f"search: divergence {first:.3g} of the best start, {last:.3g} after "
            f"{self.generations} generations, {judge.passes} forward passes; {begun} is taken")
        problem.price(pool[0])
        return pool[0]


@dataclass
class _Judge:
    """Measures candidates: on the first batch, and the best of them on the others too."""

    problem: Problem
    batches: int
    repaired: bool
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    first: dict[tuple[int, ...], float] = field(default_factory=dict)
    passes: int = 0

    def __post_init__(self) -> None:
        assert self.problem.measure is not None
        self.batches = min(self.batches, len(self.problem.measure.batches))

    def best(self, plans: Iterable[Kept], count: int) -> list[Kept]:
        """Return the best so many of some plans, the very best first."""
        own = {_key(kept): kept for kept in plans}
        for key, kept in own.items():
            if key not in self.first:
                self.first[key] = self._lost(kept, 0, 1)
        close = sorted(own, key=self.first.__getitem__)[: 2 * count]
        for key in close:
            if key not in self.known:
                rest = self._lost(own[key], 1, self.batches) if self.batches > 1 else 0.0
                self.known[key] = (self.first[key] + (self.batches - 1) * rest) / self.batches
        return [own[key] for key in sorted(close, key=self.known.__getitem__)[:count]]

    def _lost(self, kept: Kept, skip: int, batches: int) -> float:
        measure = self.problem.measure
        assert measure is not None
        self.passes += batches - skip
        found = measure.diverges(self.problem, kept, batches, skip) if self.repaired else \
            measure.lost(self.problem, kept, batches, skip)
        return found if isfinite(found) else float("inf")


def _key(kept: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(kept.values())


def _starts(problem: Problem) -> Iterator[tuple[str, Kept]]:
    """Plans that meet the target and hold under the other limits, by name; each once."""
    ways: dict[str, Callable[[Problem], Kept]] = {
        p.name: p.allocate for p in (Uniform(), GlobalRanking(), Dynamic(), Standardised())}
    for mix in (0.0, 0.25, 0.5, 0.75, 1.0) if problem.limits else (0.0,):
        ways[f"price {mix:g}"] = lambda p, mix=mix: priced(p, mix)  # type: ignore[misc]
    seen: list[Kept] = []
    for name, way in ways.items():
        try:
            kept = _whole(problem, way(problem))
        except SpaError:
            continue
        if kept is not None and kept not in seen:
            seen.append(kept)
            yield name, kept


def _whole(problem: Problem, kept: Kept) -> Kept | None:
    """The plan in the order of units, brought under all limits; None if that cannot be."""
    kept = {u.name: kept[u.name] for u in problem.units}
    made = fitted(problem, kept) if problem.limits else refine(problem, kept)
    return made if problem.met(made) and problem.holds(made) else None


def _child(problem: Problem, parent: Kept, draws: Random, moves: int, reach: float) -> Kept | None:
    """One unit less and another more, so many times, fitted to the limits again."""
    free = [u for u in problem.units if len(u.legal) > 1]
    kept = dict(parent)
    for _ in range(moves):
        down, up = (draws.choice(free) for _ in range(2))
        kept[down.name] = _moved(down, kept[down.name], -draws.random() * reach)
        kept[up.name] = _moved(up, kept[up.name], draws.random() * reach)
    return _whole(problem, kept) if kept != parent else None


def _moved(unit: Unit, kept: int, share: float) -> int:
    """Another legal count, some share of the unit's size away; the next one at least."""
    at = unit.legal.index(kept)
    near = unit.legal.index(unit.nearest(kept + share * unit.size))
    step = 1 if share > 0 else -1
    return unit.legal[min(max(0, at + step if near == at else near), len(unit.legal) - 1)]
