"""What importance passes see of a traced program: statistics of its inputs, and gradients."""

from __future__ import annotations

from ...evidence.room import Room
from ...evidence.scores import Scores
from ...groups.solution import Solution
from ..run.observe import ProgramNetwork
from ..trace import Trace
from .gradients import Gradients


def fresh_context(trace: Trace, solution: Solution, seed: int = 0) -> Scores:
    """Return a context that nothing has been gathered in yet."""
    network = ProgramNetwork(trace)
    room = Room()
    return Scores(network, solution, seed, Gradients(trace, solution, network.stored, room=room),
                  room)
