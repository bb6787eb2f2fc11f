"""Batches are dealt out to processes, and what they give is added up in the order of batches.

Floating-point sums depend on their order. So each process runs its own batches and holds back what
a batch would add; then all hear that of each batch in turn, and all have the sums that one process
alone would have, bit for bit. No more is held back than what one batch gives.

>>> total = Sums("totals", Turns())
>>> total.gather(("gates", "a"), torch.ones(2))
>>> total.gather(("gates", "a"), torch.ones(2))
>>> total["gates", "a"]
tensor([2., 2.])
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakMethod

import torch

from ..system.group import Team, here

T = TypeVar("T")
Given = tuple[tuple[str, Any], list[torch.Tensor]]
"""(where it goes, under which key), arrays"""
Take = Callable[..., None]
"""Takes in what a batch gives: (key, *arrays), or (*arrays) where there is one sum alone."""


@dataclass
class Turns:
    """What batches give to sums, taken in by their order, whichever process ran them.

    It holds none of the sums: who does says so by `home`, and is forgotten with them. In a round
    each process runs one batch at most.
    """

    team: Team = field(default_factory=here)
    _homes: dict[str, WeakMethod[Take]] = field(default_factory=dict)
    _held: list[Given] = field(default_factory=list)
    rounds: int = 0
    _done: int = 0
    at: int = 0
    _off: dict[str, dict[int, list[Given]]] = field(default_factory=dict)

    def home(self, name: str, take: Take) -> None:
        """Say which method takes in what is given under a name."""
        self._homes[name] = WeakMethod(take)

    def own(self, batches: Iterable[T]) -> list[T]:
        """Return which of some batches this process runs, one in each round at most."""
        everything = list(batches)
        self.rounds = -(-len(everything) // self.team.size)
        return list(self.team.share(everything))

    def give(self, home: str, key: Hashable, *parts: torch.Tensor) -> None:
        """Hand in what the batch under way adds to a sum."""
        if home in self._off:
            self._off[home].setdefault(self.at, []).append(((home, key), list(parts)))
        elif self.team.size == 1:
            self._into(home, key, parts)
        else:
            self._held.append(((home, key), list(parts)))

    def done(self) -> None:
        """A batch has given all that it has: take in those of this round."""
        self._done += 1
        if self.team.size > 1:
            self._take(self._held)
            self._held = []

    def finish(self) -> None:
        """No batch is left: hear the last round even where this process had none in it."""
        while self.team.size > 1 and self._done < self.rounds:
            self._done += 1
            self._take(None)
        self._done = 0

    @contextmanager
    def some(self, rounds: int) -> Iterator[None]:
        """Go through so many rounds alone for a while."""
        was, self.rounds = self.rounds, rounds
        try:
            yield
        finally:
            self.rounds = was

    @contextmanager
    def put_off(self, home: str, count: int) -> Iterator[None]:
        """Where batches go side by side, a part of each at a time: take in what is given to a home
        when all are through, in their order. `at` is the number of the one under way, of `count`.
        """
        self._off[home] = {}
        try:
            yield
            held = self._off.pop(home)
            for number in range(count):
                for (_, key), parts in held.pop(number, ()):
                    self.give(home, key, *parts)
                self.done()
            self.finish()
        finally:
            self._off.pop(home, None)

    def _take(self, mine: list[Given] | None) -> None:
        for said in self.team.in_turn(mine, "a batch"):
            for (home, key), parts in said or ():
                self._into(home, key, parts)

    def _into(self, home: str, key: Hashable, parts: Iterable[torch.Tensor]) -> None:
        take = self._homes[home]()
        if take is not None:
            take(key, *parts)


def as_is(value: torch.Tensor) -> torch.Tensor:
    """Return what is gathered first as it is."""
    return value


class Sums(dict[Any, torch.Tensor]):
    """Sums by key (strings, numbers, tuples of them), to which batches add in their order.

    `first` makes a sum of what is gathered first.
    """

    def __init__(self, name: str, turns: Turns,
                 first: Callable[[torch.Tensor], torch.Tensor] = as_is) -> None:
        super().__init__()
        self._name, self._turns, self._first = name, turns, first
        turns.home(name, self._take)

    def gather(self, key: Hashable, value: torch.Tensor) -> None:
        """Add to a sum."""
        self._turns.give(self._name, key, value)

    def _take(self, key: Hashable, value: torch.Tensor) -> None:
        have = self.get(key)
        self[key] = self._first(value) if have is None else have.add_(value)
