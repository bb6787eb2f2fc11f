"""Stored arrays by a plan: which stay as they are, and what the others become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from commuting import quick_trace
from networks import network
from torch import nn

import spacompiler
from spacompiler.axes import choices
from spacompiler.axes.choices import Choice, keep_mask
from spacompiler.groups.solution import solve
from spacompiler.plan.effects import gather_indices, norm_changes
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.emit import slicer as slicing
from spacompiler.torch_backend.emit.slicer import Slicer, _select, cut


class Normed(nn.Module):
    """Two layers with an RMSNorm between them, and one that nothing goes from."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)
        self.last = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(torch.rms_norm(self.up(x), [6], self.gain, 1e-3)))


KEPT = np.array([True, False, True, True, False, False])


def sliced(**kept: np.ndarray) -> Slicer:
    torch.manual_seed(0)
    found = quick_trace(Normed(), torch.rand(4, 5))
    solution = solve(found.graph, TABLE)
    (hidden,) = [g for g in solution.groups.values() if g.size == 6]
    return Slicer(found, solution, {hidden.atom: Choice(kept["hidden"])} if kept else {})


def test_which_arrays_stay() -> None:
    slicer = sliced(hidden=KEPT)
    assert {name for name in slicer.names() if not slicer.untouched(name)} == {
        "up.weight", "up.bias", "down.weight", "gain"}
    assert slicer.untouched_under("last.weight", None) and slicer.untouched_under("no", None)
    assert not slicer.untouched_under("last.weight", slicer.choices)
    dense = sliced()
    assert all(map(dense.untouched, dense.names())) and len(dense.names()) == 7
    dense._repaired.add("last.weight")
    assert [name for name in dense.names() if not dense.untouched(name)] == ["last.weight"]


@pytest.mark.parametrize("double", [False, True])
def test_what_arrays_become(double: bool) -> None:
    slicer, arrays = sliced(hidden=KEPT), sliced()
    at = torch.from_numpy(np.flatnonzero(KEPT))
    want = {"up.weight": lambda w: w[at], "down.weight": lambda w: w[:, at],
            "gain": lambda w: w[at].double() * 2 ** 0.5, "last.bias": lambda w: w}
    for name, change in want.items():
        dense, found = arrays.array(name), slicer.array(name, double=double)
        wide = double and name == "gain"  # others are widened where they are used
        assert found.dtype == (torch.float64 if wide else torch.float32)
        assert torch.allclose(found.double(), change(dense).double(), rtol=1e-7)
    own = slicer.array("last.bias")
    assert own.data_ptr() == arrays_of(slicer)["last.bias"].data_ptr()
    numbers = slicer.sliced("up.bias", torch.arange(6), double=True)  # no floating point
    assert numbers.tolist() == [0, 2, 3] and numbers.dtype == torch.int64
    assert slicer.sliced("last.bias", torch.arange(2), double=True).dtype == torch.int64


def arrays_of(slicer: Slicer) -> dict[str, torch.Tensor]:
    return slicer._stored


def test_norms_say_how_they_change() -> None:
    slicer = sliced(hidden=KEPT)
    (change,) = slicer._gains.values()
    assert (change.before, change.after, change.norm.gain) == (6, 3, "gain")
    assert (change.eps, change.gain) == (pytest.approx(2e-3), pytest.approx(2 ** 0.5))


def test_gathers_take_what_stays_by_its_new_place() -> None:
    net = network("x: 2x3x4x4\na = conv(x, out=6, kernel=1, groups=1)\n"
                  "b = shuffle(a, dim=1, groups=2)")
    found = quick_trace(net, net.example())
    solution = solve(found.graph, TABLE, rewire=True)
    (group,) = [g for g in solution.groups.values() if g.size == 6]
    ((gather, index),) = gather_indices(
        solution, {group.atom: Choice(KEPT)}).values()
    assert gather.index.tolist() == [0, 3, 1, 4, 2, 5]
    assert index.tolist() == [0, 2, 1]  # of 0, 2 and 3: dealt out as 0, 3, 2
    assert gather_indices(solution, {}) == {}
    assert list(norm_changes(solution, {group.atom: Choice(KEPT)})) == []


class Listed(nn.Module):
    """Parameters that a plain list holds too: a constant and a parameter of one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 4)
        self.shift = nn.Parameter(torch.zeros(4))
        self.held = [self.shift]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu().reshape(-1, 64)) + self.held[0] + self.shift


def test_a_parameter_that_a_list_holds_too_is_written_as_one() -> None:
    made = spacompiler.compile(
        Listed().eval(), (torch.randn(4, 16),), target="params~50%", importance="magnitude",
        align=1, latency=False, onnx=False)
    assert made.job.emission == "program"
    assert isinstance(dict(made.module.named_parameters())["body.shift"], nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16])
def test_numbers_of_two_bytes_are_cut_as_others_are(dtype):
    w = torch.arange(24).reshape(2, 3, 4).to(dtype)
    at = torch.tensor([0, 2])
    for axis in range(3):
        have = _select(w, {axis: at[:len(at) - (axis == 0)]})
        assert torch.equal(have, w.index_select(axis, at[:len(at) - (axis == 0)]))
    assert have.dtype == dtype and have.is_contiguous()


def test_positions_that_stay_are_found_once_for_an_axis(monkeypatch):
    made, asked = sliced(hidden=KEPT), []
    monkeypatch.setattr(choices, "keep_mask", lambda dims, *rest: asked.append(dims) or
                        keep_mask(dims, *rest))
    first = [made.array(name) for name in made.names()]
    assert len(asked) == 1
    other = {atom: Choice(~choice.table) for atom, choice in made.choices.items()}
    assert not torch.equal(made.array("down.weight", choices=other), made.array("down.weight"))
    assert all(torch.equal(made.array(n), a) for n, a in zip(made.names(), first, strict=True))


@pytest.mark.parametrize("prove", [False, True])
def test_each_array_is_cut_once_for_all_that_read_it(monkeypatch, prove):
    """The proof, the check of the program, and the model; once more by the proof's wrong index."""
    counted = []
    monkeypatch.setattr(slicing, "cut", lambda tensor, *rest: counted.append(1) or
                        cut(tensor, *rest))
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    made = spacompiler.compile(net, (torch.randn(3, 6),), target="params~60%", align=1,
                               importance="magnitude", prove=prove, onnx=False, latency=False).job
    assert len(counted) == 3 + prove  # rows of the first layer, its biases, columns of the last
    assert not made.decided.cut
    if prove:
        assert made.proof.control > 1e-3 > made.proof.error
