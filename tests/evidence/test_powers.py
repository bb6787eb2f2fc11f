"""Sums of weights onto groups: each array is read once, and the sums are those of each alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from spacompiler.evidence.powers import Powers
from spacompiler.evidence.slots import deciding, powers, rows, slots, sums_of
from spacompiler.groups.solution import solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.read.export import trace


class Net(nn.Module):
    """Convolutions of which one reads several others, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)
        self.both, self.last = nn.Conv2d(9, 6, 3), nn.Linear(6, 2)
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.one(x).relu()
        y = self.both(torch.cat([one, self.two(one)], 1)).flatten(2).transpose(1, 2)
        return self.last(self.attend(y, y, y, need_weights=False)[0])


@pytest.fixture(scope="module")
def context():
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 7, 7)
    traced = trace(net, (x,), quick=True)
    return fresh_context(traced, solve(traced.graph, TABLE))


def test_an_array_is_read_once_for_all_groups_that_are_expected(context):
    groups, read = list(context.solution.groups.values()), Counter()
    pairs = [(g, m) for g in groups for m in g.members if m.role != "carrier"]

    def stored(name: str) -> torch.Tensor:
        read[name] += 1
        return context.stored(name)

    sums = Powers(stored, context.solution.dims)
    sums.expect(groups)
    assert len(pairs) > len({m.weight for _, m in pairs})
    for group, member in pairs:
        have, each = sums.of(member, group, 2)
        whole = rows(context.stored(member.weight).double(), context.solution.dims(member.weight),
                     member.dim, group)
        torch.testing.assert_close(have, whole.square().sum(-1))
        assert (have.shape, each) == (group.shape, whole.shape[-1])
        alone = powers(context.stored(member.weight), context.solution.dims(member.weight),
                       member.dim, group, 2)
        assert torch.equal(have, alone[0]) and each == alone[1]
    assert set(read.values()) == {1}
    sums.of(pairs[0][1], pairs[0][0], 2)  # nothing is kept: the array may be another by now
    assert read[pairs[0][1].weight] == 2


def test_what_decides_is_what_slots_says(context):
    for group in context.solution.groups.values():
        for member in group.members:
            dims = context.solution.dims(member.weight)
            assert list(deciding(dims, member.dim, group)) == slots(dims, member.dim, group)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [1, 2])
def test_sums_over_blocks_are_sums(dtype, p, monkeypatch):
    monkeypatch.setattr("spacompiler.evidence.slots.BLOCK", 50)
    w = torch.randn(7, 5, 3).to(dtype)
    before, axes = w.clone(), [(0,), (1,), (0, 2), (0, 1, 2)]
    want = w.double().abs().pow(p)
    for chosen in (axes[:3], axes):
        for own, have in zip(chosen, sums_of(w, chosen, p), strict=True):
            rest = [d for d in range(3) if d not in own]
            torch.testing.assert_close(have, want.sum(rest) if rest else want, rtol=1e-5, atol=1e-5)
    assert torch.equal(w, before)
