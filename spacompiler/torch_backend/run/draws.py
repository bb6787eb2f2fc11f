"""Networks that draw random numbers in eval mode: two runs differ, so that nothing is proved."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ProofError
from ...graph.ir import Graph
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


def _first_drawn(trace: Trace) -> str:
    """Return the first value that differs between two runs from other seeds, or ""."""
    seen: dict[str, torch.Tensor] = {}
    found: list[str] = []

    def compare(name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or found:
            return
        have = seen.setdefault(name, value.detach().clone())
        same = have.shape == value.shape and bool(torch.all(
            (have == value) | ((have != have) & (value != value))))
        if not same:
            found.append(name)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            Runner(trace.program, watch=compare).call(trace.args, trace.kwargs)
    return found[0] if found else ""
