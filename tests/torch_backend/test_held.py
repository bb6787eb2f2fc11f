"""Arrays are fetched where a node reads them, and large ones widened in parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from spacompiler.evidence.where import DOUBLE
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run import held
from spacompiler.torch_backend.run.runner import Runner


class _Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 6), nn.Linear(6, 9)
        self.last = nn.Linear(9, 5, bias=False)

    def forward(self, places):
        return self.last(self.first(self.table(places)).relu())


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    net, places = _Texts().bfloat16().eval(), torch.tensor([[3, 1, 4], [1, 5, 9]])
    return trace(net, (places,), quick=True), places


def test_an_array_is_fetched_when_it_is_read_and_not_before(traced):
    found, places = traced
    told: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        told.append(name)
        return found.program.state_dict[name]

    run = Runner(found.program, fetch, watch=lambda name, value: told.append("ran"))
    with torch.no_grad():
        run.call((places,), {})
    nodes = [n for n in found.program.graph.nodes if n.op == "placeholder"]
    assert told[:len(nodes)] == ["ran"] * len(nodes)
    order = [name for name in told if name != "ran"]
    assert order == ["table.weight", "first.weight", "first.bias", "last.weight"]
    assert told.index("last.weight") > told.index("first.weight") + 2


@pytest.mark.parametrize("large", [1, 1 << 30])
def test_what_is_widened_in_parts_is_what_is_widened_whole(traced, monkeypatch, large):
    found, places = traced
    monkeypatch.setattr(held, "ENTRIES", 20)
    monkeypatch.setattr("spacompiler.torch_backend.run.runner.LARGE", large)
    with torch.no_grad():
        got = Runner(found.program, where=DOUBLE).call((places,), {})[0]
    net = {name: array.double() for name, array in found.program.state_dict.items()}
    x = functional.linear(net["table.weight"][places], net["first.weight"], net["first.bias"])
    want = functional.linear(x.relu(), net["last.weight"])
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
