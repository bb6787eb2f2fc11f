"""Gradients of all batches side by side, segment by segment, are those of one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spacompiler.evidence import room
from spacompiler.evidence.losses import default_loss
from spacompiler.evidence.scores import Scores
from spacompiler.groups.solution import Group, Solution, solve
from spacompiler.models_zoo import load
from spacompiler.plan.legal import candidates
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.gather import gradients
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

KINDS = {"gates", "token_gates", "fisher", "elements", "vectors", "curvature", "weight_gradients",
         "covariance", "hessian"}


class Shuffled(nn.Module):
    """Results of one operator that are read far apart, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.shared = nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, n, 6) to (b, n, 3)."""
        a, b = self.first(x).chunk(2, -1)
        for norm in self.norms:
            a = a + torch.relu(self.shared(norm(a)))
        return self.last(torch.cat([a, self.shared(b)], -1))


def _shuffled() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    x = torch.randn(7, 4, 6)
    return Shuffled().eval(), [((p,), {}) for p in x.split(3)]


def _llama() -> tuple[nn.Module, list[Any]]:
    module, _ = load("llama-gqa").build()
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (5, 9), generator=draws)
    return module, [((), {"input_ids": p, "use_cache": False}) for p in ids.split(2)]


def _groups(solution: Solution) -> list[Group]:
    return candidates(solution, roles=("channel", "head", "hidden"), approximate=True)


def solved(make: Callable[[], tuple[nn.Module, list[Any]]]) -> tuple[Trace, Solution, list[Any]]:
    """A traced network, its axes and its batches."""
    module, batches = make()
    made = trace(module, batches[0][1] or batches[0][0])
    return made, solve(made.graph, TABLE, rewire=True), batches


def gathered(made: Trace, solution: Solution, batches: list[Any], kinds: set[str]) -> Scores:
    """Everything that there is to gather, of groups of all kinds."""
    context = fresh_context(made, solution)
    context.calibrate(kinds, batches, default_loss, groups=_groups(solution))
    return context


def _same(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("make, without, abreast", [
    (_llama, {"hessian"}, 1 << 29), (_shuffled, set(), 5000)], ids=["llama", "some at a time"])
def test_gradients_side_by_side_are_equal_to_the_bit(
        make: Callable[[], tuple[nn.Module, list[Any]]], without: set[str], abreast: int,
        monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, found = KINDS - without, solved(make)
    here = gathered(*found, kinds)
    monkeypatch.setattr(gradients, "LARGE", 0)
    monkeypatch.setattr(gradients, "ABREAST", abreast)
    monkeypatch.setattr(room, "LIMIT", 0)
    monkeypatch.setattr(room, "FEW", 0)
    there = gathered(*found, kinds)
    a, b = here.gradients, there.gradients
    assert a is not None and b is not None and (a.batches, a.examples) == (b.batches, b.examples)
    assert a.gates and a.curvature and a.sums and a.arrays
    for one, other in ((a.gates, b.gates), (a.sums, b.sums), (a.arrays, b.arrays),
                       (a.curvature, b.curvature)):
        assert _same(one, other)
    for key, found in here._inputs.items():
        assert torch.equal(found["covariance"].gram, there._inputs[key]["covariance"].gram)


def test_arrays_are_fetched_once_forward_and_once_backward(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """For all batches together."""
    monkeypatch.setattr(gradients, "LARGE", 0)
    made, solution, batches = solved(_shuffled)
    read: list[str] = []
    context = fresh_context(made, solution)
    stored = context.network.stored

    def counted(name: str) -> torch.Tensor:
        read.append(name)
        return stored(name)

    assert isinstance(context.gradients, gradients.Gradients)
    context.gradients.stored = counted
    context.calibrate({"gates"}, batches, default_loss, groups=_groups(solution))
    assert len(batches) > 2 and read.count("first.weight") == 2
