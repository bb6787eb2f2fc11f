"""Search: counts under every limit at once, evolved by what each does to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from random import Random
from typing import ClassVar

from spacompiler.errors import SpaError
from spacompiler.passes.dynamic import Dynamic
from spacompiler.passes.global_ranking import GlobalRanking
from spacompiler.passes.measured import moved, near
from spacompiler.passes.standardised import Standardised
from spacompiler.passes.uniform import Uniform
from spacompiler.plan.fitting import fitted, mixes, priced
from spacompiler.plan.problem import Measured, Problem, Unit
from spacompiler.plan.settling import refine
from spacompiler.trials.sensitivity import Change

Kept = dict[str, int]
Changes = dict[tuple[str, int], Change]
REACH = (1 / 64, 1 / 24, 1 / 8)
"""How far single moves go that are foreseen, as shares of a unit's size."""
SCALES = 6
"""How often the steps of single units are halved, at most: large and small ones are as likely."""
CAUTION = (0.5, 16.0)
"""What curvature is weighted by where several such moves are taken: drawn between these."""
POSITIONS = 512
"""Tokens, or examples, that every candidate meets; the best ones meet all batches."""


@dataclass(frozen=True)
class Search:
    """Evolve counts under all limits at once, by the measured divergence from the dense network.

    It starts from uniform counts, from one ranking of all units, from standardised scores, from the
    exact optimum on curves of scores (dynamic programming) and from those of the relaxed integer
    program, at several mixes of prices where there are several limits. In each generation,
    `offspring` are made: some cross two of the `parents` best and move up to `moves` pairs of
    units, one down, one up, by up to `reach` of their size, small steps as often as large ones;
    with `led`, every other one takes moves that two backward passes of the best network foresee to
    be good (see `measured`), of some units drawn anew. Each is fitted to all limits, meets the
    first of `batches`, and, if it is one of the best there, the others: a passage forward of the
    network as it would be repaired, or masked without `repaired`. As Once-for-All (ICLR 2020) and
    Puzzle (2024) search, without training.
    """

    name: ClassVar[str] = "search"
    by_layer: ClassVar[bool] = True
    on_files: ClassVar[bool] = True
    generations: int = 6
    offspring: int = 12
    parents: int = 4
    moves: int = 2
    reach: float = 1 / 6
    batches: int = 4
    repaired: bool = True
    led: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.generations, self.offspring, self.parents, self.moves, self.batches)
        if min(counts) < 1 or not 0 < self.reach <= 1:
            raise TypeError("generations, offspring, parents, moves, batches at least 1; reach "
                            "above 0, at most 1")

    def allocate(self, problem: Problem) -> Kept:
        """Return kept slices by unit: those of the least divergence that was found."""
        measure = problem.measure
        if measure is None or not measure.batches:
            raise SpaError("search goes by what networks do to calibration data, and there is none",
                           fix="give --calibration, or use --allocation dynamic")
        if not problem.on_data:
            problem.notes.append("search: divergences are measured on example inputs alone")
        if problem.closest:
            problem = replace(problem, tolerance=max(problem.tolerance, _nearest(problem)))
        starts = dict(_starts(problem))
        if not starts:
            return GlobalRanking(checked=False).allocate(problem)  # whose miss says what binds
        judge = _Judge(problem, measure, self.batches, self.repaired)
        pool = judge.best(starts.values(), self.parents)
        first, begun = judge.known[_key(pool[0])], pool[0]
        draws, about, changes = Random(self.seed), Kept(), Changes()
        for _ in range(self.generations):
            if pool[0] != about:
                about, changes = pool[0], self._foreseen(problem, measure, pool[0])
            pool = judge.best([*pool, *self._offspring(problem, pool, changes, draws)],
                              self.parents)
        name = next(n for n, kept in starts.items() if kept == begun)
        problem.notes.append(
            f"search: divergence {first:.3g} of the best of {len(starts)} starts, {name}, "
            f"{judge.known[_key(pool[0])]:.3g} after {self.generations} generations, "
            f"{judge.passes} forward passes")
        problem.price(pool[0])
        return pool[0]

    def _foreseen(self, problem: Problem, measure: Measured, kept: Kept) -> Changes:
        """What other counts of single units are foreseen to do; nothing where it cannot be said."""
        changes = getattr(measure, "changes", None)
        if not self.led or changes is None:
            return {}
        moves = {u.name: near(u, kept[u.name], REACH) for u in problem.units}
        found: Changes = changes(problem, kept, moves, self.batches)[0]
        return found

    def _offspring(self, problem: Problem, pool: list[Kept], changes: Changes,
                   draws: Random) -> Iterator[Kept]:
        """Counts that meet all limits, made of the best so far."""
        for i in range(self.offspring):
            kept = _led(problem, pool[0], changes, draws) if changes and i % 2 else \
                self._bred(problem, draws.choice(pool), draws.choice(pool), draws)
            made = _whole(problem, kept)
            if made is not None:
                yield made

    def _bred(self, problem: Problem, one: Kept, other: Kept, draws: Random) -> Kept:
        """Counts of two crossed; then one unit less and another more, so many times."""
        free = [u for u in problem.units if len(u.legal) > 1]
        kept = {name: draws.choice((one[name], other[name])) for name in one}
        for _ in range(draws.randint(1, self.moves)):
            down, up = (draws.choice(free) for _ in range(2))
            far = self.reach * 2 ** (-SCALES * draws.random())
            kept[down.name] = _beside(down, kept[down.name], -far)
            kept[up.name] = _beside(up, kept[up.name], far)
        return kept


@dataclass
class _Judge:
    """Measures candidates: all on the first batches, and the best of them on the others too."""

    problem: Problem
    measure: Measured
    batches: int
    repaired: bool
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    first: dict[tuple[int, ...], float] = field(default_factory=dict)
    passes: int = 0

    def __post_init__(self) -> None:
        self.batches = min(self.batches, len(self.measure.batches))
        self.few = self.measure.few(self.batches, POSITIONS)

    def best(self, plans: Iterable[Kept], count: int) -> list[Kept]:
        """Return the best so many of some plans, the very best first."""
        own = {_key(kept): kept for kept in plans}
        for key, kept in own.items():
            if key not in self.first:
                self.first[key] = self._lost(kept, 0, self.few)
        close = sorted(own, key=self.first.__getitem__)[:count]
        close += [key for key in own if key in self.known and key not in close]
        for key in close:
            if key not in self.known:
                rest = self._lost(own[key], self.few, self.batches)
                self.known[key] = (self.few * self.first[key] + (self.batches - self.few) * rest
                                   ) / self.batches
        return [own[key] for key in sorted(close, key=self.known.__getitem__)[:count]]

    def _lost(self, kept: Kept, skip: int, batches: int) -> float:
        if skip == batches:
            return 0.0
        self.passes += batches - skip
        how = self.measure.diverges if self.repaired else self.measure.lost
        found = how(self.problem, kept, batches, skip)
        return found if isfinite(found) else float("inf")


def _key(kept: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(kept.values())


def _starts(problem: Problem) -> Iterator[tuple[str, Kept]]:
    """Plans that meet the target and hold under the other limits, by name; each once."""
    ways: dict[str, Callable[[Problem], Kept]] = {
        p.name: p.allocate for p in (Uniform(), GlobalRanking(checked=False), Dynamic(),
                                     Standardised())}
    ways["global by sums"] = lambda p: GlobalRanking(checked=False).allocate(
        replace(p, losses="exact"))
    for mix in mixes(problem):
        ways[f"prices {', '.join(f'{w:.2g}' for w in mix)}"] = \
            lambda p, mix=mix: priced(p, mix)  # type: ignore[misc]
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


def _nearest(problem: Problem) -> float:
    """By what share of the dense cost the nearest counts miss the target."""
    kept = refine(problem, Uniform().allocate(problem))
    return abs(problem.price(kept) - problem.target) / problem.dense


def _led(problem: Problem, kept: Kept, changes: Changes, draws: Random) -> Kept:
    """The best moves of some units, as foreseen, with a caution that is drawn."""
    some = {u.name for u in problem.units if draws.random() < 0.75}
    caution = CAUTION[0] * (CAUTION[1] / CAUTION[0]) ** draws.random()
    return moved(problem, kept, {key: c for key, c in changes.items() if key[0] in some}, caution)


def _beside(unit: Unit, kept: int, share: float) -> int:
    """Another legal count, some share of the unit's size away; the next one at least."""
    at = unit.legal.index(kept)
    found = unit.legal.index(unit.nearest(kept + share * unit.size))
    step = 1 if share > 0 else -1
    return unit.legal[min(max(0, at + step if found == at else found), len(unit.legal) - 1)]
