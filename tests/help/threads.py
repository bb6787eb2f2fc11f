"""Threads in place of the processes of a run."""

from __future__ import annotations

import threading

from spacompiler.system.group import Team
from spacompiler.system.messages import decoded, encoded


class Threads(Team):
    """One of so many threads; what they say goes over a board."""

    def __init__(self, rank, size, board, gate):
        self.rank, self.size, self.board, self.gate = rank, size, board, gate

    def in_turn(self, said, what):
        self.board[self.rank] = None if said is None else encoded(said)
        self.gate.wait()
        heard = [None if data is None else decoded(data.clone()) for data in self.board]
        self.gate.wait()
        yield from heard


def in_threads(size, work):
    """What `work(team)` gives in each of so many processes."""
    board, gate, made = [None] * size, threading.Barrier(size, timeout=20), [None] * size
    problems = []

    def run(rank):
        try:
            made[rank] = work(Threads(rank, size, board, gate))
        except Exception as problem:
            problems.append(problem)
            gate.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if problems:
        raise problems[0]
    return made
