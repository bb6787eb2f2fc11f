"""Processes of one run: all carry out the same program, and what takes long is dealt out.

Each process has the same model, data and options, and every step gives the same in each of them.
What can be dealt out (batches of calibration, least squares of layers) is: each process does its
share, and all hear the results in one order, so that sums have the same bits however many there
are. One process writes. A launcher starts them (`launched`); gloo carries what they say.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from ..errors import ElsewhereError, SpaError, UsageError
from .launched import launched
from .messages import Message, decoded, encoded

T = TypeVar("T")
R = TypeVar("R")
MEETING, LAST_WORDS, BEAT = 300.0, 20.0, 5.0
"""Seconds that processes wait for each other to come, that a failing one waits to be heard, and
between two signs of life."""
SILENCE = 300.0
"""Seconds without a sign of life after which a process is taken to be dead; the variable
SPACOMPILER_SILENCE of the environment says another number."""
NOTHING, SAID, FAILED = range(3)


class Team:
    """The processes of a run: which one this is, and how they hear of each other; here it is alone.

    `rank` is the number of this one, from 0, and `size` how many there are.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> Sequence[T]:
        """Return what of some things is this process's to do: every `size`-th."""
        return things if self.size == 1 else [*things[self.rank::self.size]]

    def in_turn(self, said: Message | None, what: str) -> Iterator[Message | None]:
        """Yield what each process says (or None), in the order of their numbers.

        All must call it, with the same `what`, and go through all that it yields. Raises
        ElsewhereError if another process failed or is gone.
        """
        yield said

    def of_first(self, make: Callable[[], T], what: str) -> T:
        """Return what the first process makes, plain data, in all of them."""
        said: Message | None = [(json.dumps(make()), [])] if self.first else None
        found = [part for part in self.in_turn(said, what) if part is not None]
        made: T = json.loads(found[0][0][0])
        return made

    def each(self, things: Sequence[T], work: Callable[[T], R], what: str) -> list[R]:
        """Return what some work gives of each thing, every one done by one process: numbers, or
        tuples of them.
        """
        own = [work(thing) for thing in self.share(things)]
        made: list[Any] = [None] * len(things)
        for rank, said in enumerate(self.in_turn([(own, [])], what)):
            made[rank::self.size] = (said or [((), [])])[0][0]
        return made

    def agree(self, fact: str, what: str) -> None:
        """Raise SpaError unless all processes have the same fact."""
        facts = [part[0][0] for part in self.in_turn([(fact, [])], what) if part]
        if len(set(facts)) > 1:
            raise SpaError(f"the processes do not agree on {what}", where=" ".join(
                f"{rank}: {str(each)[:12]}" for rank, each in enumerate(facts)),
                why="kernels, threads or files differ between them",
                fix="use machines, libraries and OMP_NUM_THREADS that are alike")


_here = Team()


def here() -> Team:
    """Return the processes that this one works with; by itself where nobody joined others."""
    return _here


@contextmanager
def apart() -> Iterator[Team]:
    """Work by oneself for a while: what the others do meanwhile is their own affair.

    Gives those that it worked with.
    """
    global _here
    was, _here = _here, Team()
    try:
        yield was
    finally:
        _here = was


@contextmanager
def joined(together: bool) -> Iterator[Team]:
    """Work with the other processes that a launcher started, if there are any and it is wanted.

    A problem in the block is told to the others, whose next exchange then raises it. Raises
    UsageError for an environment that cannot be, SpaError if the others do not come.
    """
    global _here
    found = launched() if together and _here.size == 1 else None
    if found is None:
        yield _here
        return
    team = _Gathered(*found)
    was, _here = _here, team
    try:
        yield team
        team.part()
    except ElsewhereError:
        raise
    except Exception as problem:
        lower = team.fail(problem)
        if lower is not None:  # it says the same
            lower.code = getattr(problem, "code", lower.code)
            raise lower from problem
        raise
    finally:
        _here = was
        team.close()


def _patience(said: str) -> float:
    """Return the seconds of silence that the environment allows; raises UsageError for none."""
    try:
        found = float(said or SILENCE)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UsageError(f"cannot read SPACOMPILER_SILENCE={said!r}",
                         why="it is a number of seconds above 0", fix="unset it")
    return found


class _Gathered(Team):
    """Several processes, over gloo."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._silence = _patience(os.environ.get("SPACOMPILER_SILENCE", ""))
        self._pending = False
        self._over, self._signs = threading.Event(), dict[int, tuple[bytes, float]]()
        try:
            self._store = _meeting(rank, size)
            self._store.set(f"alive/{rank}", "0")
            self._group: Any = dist.ProcessGroupGloo(self._store, rank, size, timedelta(days=7))
        except (RuntimeError, ValueError, OSError) as problem:
            raise SpaError("the processes of this run do not meet",
                           where=f"process {rank} of {size}", why=str(problem).splitlines()[0],
                           fix="start all of them by one launcher, with hosts and ports that "
                               "reach each other") from problem
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def in_turn(self, said: Message | None, what: str) -> Iterator[Message | None]:
        data = torch.zeros(0, dtype=torch.uint8) if said is None else encoded(said)
        heads = self._heads(NOTHING if said is None else SAID, len(data), what)
        if len({crc for *_, crc in heads}) > 1:
            raise SpaError("the processes have come apart", where=f"process {self.rank}: {what}",
                           why="they do not all do the same", fix="start all with equal options")
        for rank, (state, length, _) in enumerate(heads):
            if state == NOTHING:
                yield None
            elif rank == self.rank:
                self._send(data, rank)
                yield said
            else:
                yield decoded(self._send(torch.empty(length, dtype=torch.uint8), rank))

    def _heads(self, state: int, length: int, what: str, limit: float | None = None,
               ) -> list[tuple[int, int, int]]:
        """Say what is to come, and hear it from all; raises ElsewhereError where one failed."""
        mine = torch.tensor([state, length, crc32(what.encode())])
        heads = [torch.zeros_like(mine) for _ in range(self.size)]
        self._wait(self._group.allgather([heads], [mine]), limit)
        found: list[tuple[int, int, int]] = [tuple(head.tolist()) for head in heads]
        failed = [rank for rank, (how, *_) in enumerate(found) if how == FAILED]
        if failed and state != FAILED:
            texts = {rank: self._send(torch.empty(found[rank][1], dtype=torch.uint8), rank)
                     for rank in failed}
            words = decoded(texts[failed[0]])[0][0]
            raise _failed(failed[0], self.size, words)
        return found

    def _send(self, data: torch.Tensor, rank: int, limit: float | None = None) -> torch.Tensor:
        """Have all hear a process's bytes."""
        options = dist.BroadcastOptions()
        options.rootRank = rank
        self._wait(self._group.broadcast([data], options), limit)
        return data

    def _wait(self, work: dist.Work, limit: float | None = None) -> None:
        """Wait for an exchange, so that signals are heeded; a process without life is an error."""
        began, pause, look = time.monotonic(), 2e-5, BEAT
        self._pending = True
        while not work.is_completed():
            time.sleep(pause)
            pause = min(pause * 1.2, 0.02)
            waited = time.monotonic() - began
            if limit is not None and waited > limit:
                raise TimeoutError
            if waited > look:
                look += BEAT
                self._check_alive()
        try:
            work.wait()
        except RuntimeError as problem:
            raise _gone("its connection was closed") from problem
        self._pending = False

    def _check_alive(self) -> None:
        now = time.monotonic()
        for rank in range(self.size):
            try:
                sign = self._store.get(f"alive/{rank}")
            except RuntimeError as problem:
                raise _gone("the place where they meet is gone") from problem
            have = self._signs.get(rank)
            if have is None or have[0] != sign:
                self._signs[rank] = (sign, now)
            elif now - have[1] > self._silence and rank != self.rank:
                raise _gone(f"process {rank} gave no sign of life for {self._silence:.0f} s")

    def _live(self) -> None:
        """Give signs of life."""
        count = 0
        while not self._over.wait(BEAT):
            count += 1
            try:
                self._store.set(f"alive/{self.rank}", str(count))
            except RuntimeError:  # nobody is there to see them
                return

    def part(self) -> None:
        """Wait until all are done; whoever has gone by then is not missed."""
        with suppress(ElsewhereError):
            for _ in self.in_turn(None, "the end"):
                pass

    def fail(self, problem: Exception) -> ElsewhereError | None:
        """Tell the others what went wrong, if they come to hear it.

        Returns the error of a process with a lower number that failed with the same words.
        """
        what = problem.what if isinstance(problem, SpaError) else \
            f"{type(problem).__name__}: {problem}"
        data, lower = encoded([(what, [])]), None
        with suppress(Exception):  # the problem itself is told in any case
            heads = self._heads(FAILED, len(data), "", LAST_WORDS)
            for rank, (state, length, _) in enumerate(heads):
                if state == FAILED:
                    own = data if rank == self.rank else torch.empty(length, dtype=torch.uint8)
                    said = decoded(self._send(own, rank, LAST_WORDS))[0][0]
                    if rank < self.rank and said == what:
                        lower = _failed(rank, self.size, said)
        return lower

    def close(self) -> None:
        """Give no more signs of life, and let go of the connections."""
        self._over.set()
        self._life.join(1.0)
        if self._pending:  # to end it would wait for whoever does not answer
            with suppress(Exception):
                self._group.abort()
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        del self._group


_meetings: list[Any] = []


def _meeting(rank: int, size: int) -> Any:
    """Where the processes of a run exchange addresses: each run has a place of its own.

    The store is held for the next run: one process may be there before another has left.
    """
    if dist.is_initialized():
        store = distributed_c10d._get_default_store()
    elif _meetings:
        store = _meetings[-1]
    else:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=MEETING)))
    store.set_timeout(timedelta(seconds=MEETING))
    _meetings.append(store)
    return distributed_c10d.PrefixStore(f"spacompiler/{len(_meetings)}", store)


def _failed(rank: int, size: int, words: str) -> ElsewhereError:
    return ElsewhereError(f"process {rank} of {size} failed: {words}")


def _gone(why: str) -> ElsewhereError:
    return ElsewhereError("another process of this run is gone", why=why,
                          fix="see what it said; what was kept with --work is taken up again")
