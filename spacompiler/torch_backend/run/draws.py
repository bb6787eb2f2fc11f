"""Networks that draw random numbers in eval mode: two runs differ, so that nothing is proved."""

from __future__ import annotations

import torch

from ...errors import ProofError
from ...graph.ir import Graph
from ...stages.comparison import tensors
from ..trace import Trace
from .runner import Runner


def check_draws_nothing(trace: Trace, graph: Graph) -> None:
    """Raise ProofError, naming the operator, if two runs on the example inputs differ."""
    found = _first_drawn(trace)
    if found:
        node = next((n for n in graph.nodes if found in (n.name, *n.outputs)), None)
        raise ProofError(
            "the network draws random numbers in eval mode, so that no two runs of it agree",
            where=found if node is None else node.title(),
            why="the proof compares results, and these differ from one run to the next",
            fix="let it draw while self.training only, or take the numbers as an input")


_UNFILLED = ("aten.empty", "aten.new_empty")
"""Operators that return memory as it lies; what is read of it before it is written is no result."""


def _first_drawn(trace: Trace) -> str:
    """Return the first value that differs between two runs from other seeds whose results differ,
    or "".
    """
    seen: dict[str, torch.Tensor] = {}
    found: list[str] = []
    unfilled = {node.name for node in trace.program.graph.nodes
                if str(node.target).startswith(_UNFILLED)}

    def look(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and not found and name not in unfilled and \
                not _same(seen.setdefault(name, value.detach().clone()), value):
            found.append(name)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(Runner(trace.program, watch=look).call(trace.args, trace.kwargs))
    pairs = zip(*map(tensors, results), strict=True)
    return found[0] if found and not all(_same(a, b) for a, b in pairs) else ""


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal values, of which NaN is one."""
    return one.shape == other.shape and bool(torch.all(
        (one == other) | ((one != one) & (other != other))))
