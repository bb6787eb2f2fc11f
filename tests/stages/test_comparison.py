"""One rule compares results everywhere: nothing slips through, and each check sees garbage."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.deploy.parity import parity
from spacompiler.errors import ProofError, SpaError
from spacompiler.stages.comparison import compare, leaves, tensors
from spacompiler.torch_backend.weights import runs_like

X = torch.tensor([1.0, -2.0])
INF, NAN = float("inf"), float("nan")
Pair = namedtuple("Pair", "a b")


@dataclass
class Data:
    y: Any
    note: str = "x"


class Plain:
    def __init__(self, y: Any) -> None:
        self.y = y


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y: Any) -> None:
        self.y = y


NESTS = [lambda x: x, lambda x: (x,), lambda x: [None, x], lambda x: {"y": x},
         lambda x: OrderedDict(y=x), lambda x: UserDict(y=x), lambda x: Pair("a", x),
         Data, Plain, Slotted, lambda x: {"a": [Plain((Data(x), None))]}, lambda x: x.numpy()]


@pytest.mark.parametrize("nest", NESTS)
def test_tensors_are_found_in_whatever_holds_them(nest) -> None:
    assert [t.tolist() for t in tensors(nest(X))] == [X.tolist()]
    assert compare(nest(X), nest(X.clone())) == (0.0, 0.0, "")
    assert compare(nest(X), nest(X * 2)).relative == 0.5
    assert not compare(nest(X), nest(X * 2)).within(0.4)


@pytest.mark.parametrize("got, want", [
    (X, X[:1]), (X, X[None]), (X, (X,)), ((X, X), (X,)), ({"a": X}, {"b": X}), ((), ()),
    (None, None), ("a", "a"), (X, X.int()), (X > 0, X.int()), (torch.tensor([NAN, 1.0]), X),
    (X, torch.tensor([NAN, 1.0])), (torch.full((2,), NAN), torch.full((2,), NAN)),
    (torch.tensor([INF, 1.0]), torch.tensor([-INF, 1.0])), (torch.zeros(0, 2), torch.zeros(0, 3)),
    (Plain(X), Data(X + 1)), (Plain(None), Plain(None)), ({"y": 1.5}, {"y": 2.5}), (3, 4),
    (torch.tensor([1 + 1j]), torch.tensor([1 + 2j])), (torch.tensor([True]), torch.tensor([False])),
])
def test_what_differs_or_cannot_be_compared_never_agrees(got, want) -> None:
    assert not compare(got, want).within(0.1)


@pytest.mark.parametrize("both", [
    torch.zeros(0, 3), (torch.zeros(0), None), torch.tensor([NAN, 1.0]), torch.tensor([-INF, 1.0]),
    X.bfloat16(), torch.tensor([1, 2]), X > 0, 1.5, X.to_sparse(), torch.tensor([1 + 1j])])
def test_what_is_equal_agrees(both) -> None:
    assert compare(both, both).within(0.0)


def test_results_that_hold_themselves_end() -> None:
    loop = Plain(X)
    loop.me = loop
    assert [path for path, _ in leaves(loop)] == [".y"]


def test_sizes_are_no_results_of_programs() -> None:
    assert len(tensors((X, 3, True))) == 1 and len(leaves((X, 3, True))) == 3


# --- each checker is fed garbage ------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Net(nn.Module):
    """Reads an array of its part outside of it, and cannot be traced whole."""

    def __init__(self, wrap, outside: float) -> None:
        super().__init__()
        self.body, self.wrap, self.outside = Body(), wrap, outside

    def forward(self, x):
        y = self.body(x) + self.outside * self.body.a.bias.abs().sum()
        while y.abs().max() > 1e9:
            y = y / 2
        return self.wrap(y)


@pytest.mark.parametrize("wrap", [lambda y: y, Plain, Data, lambda y: {"y": [Plain(y)]},
                                  lambda y: Plain(float(y.sum()))])
def test_the_whole_is_checked_whatever_class_it_returns(wrap) -> None:
    options = {"target": "params=50%", "importance": "magnitude", "align": 1, "latency": False,
               "onnx": False}
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    with pytest.raises(ProofError, match="more of a part than its results"):
        spacompiler.compile(Net(wrap, 3.0).eval(), (x,), **options)
    assert spacompiler.compile(Net(wrap, 0.0).eval(), (x,), **options).job.proof.holds


@pytest.mark.parametrize("wrong", [
    lambda y: y + 1, lambda y: y[:1], lambda y: y * NAN, lambda y: (y, y), lambda y: None])
def test_the_module_check_sees_garbage(wrong) -> None:
    class Wrong(nn.Module):
        def forward(self, x):
            return wrong(x)

    assert runs_like(nn.Identity(), (X,), {}, [X]) == ""
    assert runs_like(Wrong(), (X,), {}, [X]) != ""


@pytest.mark.parametrize("wrong", [
    lambda y: y + 1, lambda y: y[:, :1], lambda y: y * np.float32(NAN), lambda y: y.astype(int)])
def test_onnx_parity_sees_garbage(tmp_path, wrong) -> None:
    import onnx
    from onnx import parser

    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y) '
        "{ y = Relu(x) }"), path)
    feed = {"x": np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)}
    (good,) = parity(path, lambda f: [np.maximum(f["x"], 0)], [feed])
    assert good.max_abs == 0
    try:
        (found,) = parity(path, lambda f: [wrong(np.maximum(f["x"], 0))], [feed])
    except SpaError as problem:
        assert "cannot be compared" in problem.what
    else:
        assert not found.max_abs <= 1e-3 and not found.max_rel <= 1e-3
