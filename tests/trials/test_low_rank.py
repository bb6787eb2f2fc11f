"""Layers as products of two: the least error for their rank, one budget, proof, files, ONNX."""

import json

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import ControlError, ProofError, SpaError, UsageError
from spacompiler.request.recipe import Recipe
from spacompiler.trials import low_rank
from spacompiler.trials.low_rank import Spectrum, ranks

OPTIONS = {"align": 1, "importance": "magnitude", "latency": False, "repair": "none"}


class Net(nn.Module):
    """Layers whose results lie in few directions of the data."""

    def __init__(self):
        super().__init__()
        self.up, self.mid = nn.Linear(12, 40), nn.Linear(40, 30, bias=False)
        self.head = nn.Linear(30, 5)

    def forward(self, x):
        return self.head(self.mid(self.up(x).relu()).tanh())


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net()


X = torch.randn(300, 12, generator=torch.Generator().manual_seed(2)) @ torch.diag(
    torch.logspace(0, -2, 12))


@pytest.fixture(scope="module")
def small(net, tmp_path_factory):
    out = tmp_path_factory.mktemp("low") / "out"
    result = spacompiler.compile(net, (X[:6],), target="params=45%", low_rank=("mid=50%",), out=out,
                                 calibration=[(x,) for x in X.split(100)], onnx=True, **OPTIONS)
    return result, out


def test_a_product_has_the_least_error_of_its_rank(net):
    """No matrix of the rank is nearer on the data, the truncated SVD of the weight neither."""
    result = spacompiler.compile(net, (X[:6],), target="params~90%", low_rank=("mid=50%",),
                                 calibration=[(x,) for x in X.split(100)], onnx=False, **OPTIONS)
    a, b = (part.weight for part in result.job.now.model.mid)
    rank = len(a)
    assert rank == result.job.now.factored.ranks["mid"] == int(0.5 * 1200 / 70)
    with torch.no_grad():
        x = net.up(X).relu()
        y = x @ net.mid.weight.T
        least = torch.linalg.svdvals(y.double())[rank:].square().sum()
        u, s, v = torch.linalg.svd(net.mid.weight)
        plain = (y - x @ ((u[:, :rank] * s[:rank]) @ v[:rank]).T).square().sum()
        got = (y - x @ (b @ a).T).double().square().sum()
    assert got == pytest.approx(float(least), rel=1e-2) and got < 0.95 * plain
    torch.testing.assert_close(a, b.T @ net.mid.weight, rtol=0, atol=1e-6)


def test_widths_go_beside_ranks_and_files_load_again(net, small):
    result, out = small
    assert isinstance(result.module.mid, nn.Sequential)
    costs = result.plan.costs["params"]
    assert costs["dense"] == sum(p.numel() for p in net.parameters())
    assert costs["pruned"] == pytest.approx(0.45 * costs["dense"], abs=0.02 * costs["dense"])
    assert result.module.up.out_features < 40
    again = spacompiler.load(out, model=net)
    with torch.no_grad():
        assert torch.equal(again(X), result.module(X))
    data = json.loads((out / "report.json").read_text())
    assert data["low_rank"]["ranks"] == dict(result.job.now.factored.ranks)
    assert data["onnx"] and all(c["max_abs"] < 1e-4 for c in data["onnx"])
    found = {c.name: c for c in spacompiler.verify(out, net)}
    assert found["reload"].passed and found["plan identity"].passed is None
    assert net.mid.weight.shape == (30, 40)


def test_one_budget_goes_where_it_takes_away_most():
    flat = Spectrum(torch.zeros(20, 20), energy=torch.ones(20))
    steep = Spectrum(torch.zeros(20, 20), energy=0.25 ** torch.arange(20.0))
    found = ranks({"flat": flat, "steep": steep}, 0.4)
    assert found["flat"] > found["steep"] and sum(found.values()) * 40 <= 0.4 * 800
    whole = ranks({"flat": flat, "steep": steep}, 0.7)
    assert "flat" not in whole and whole["steep"] * 40 <= 0.7 * 800 - 400


@pytest.mark.parametrize("broken, error", [("order", ProofError), ("none", ControlError)])
def test_a_wrong_product_is_caught(net, monkeypatch, broken, error):
    if broken == "order":
        plain = low_rank.factored
        monkeypatch.setattr(low_rank, "factored", lambda m, s, f: plain(
            m, s, {p: (a.flip(0), b) for p, (a, b) in f.items()}))
    else:
        monkeypatch.setattr(low_rank, "relative_error", lambda *of: 0.0)
    with pytest.raises(error):
        spacompiler.compile(net, (X[:6],), target="params~90%", low_rank=("mid=50%",), onnx=False,
                            **OPTIONS)


@pytest.mark.parametrize("given, error, words", [
    ({"low_rank": ("mid",)}, UsageError, "cannot read low rank"),
    ({"low_rank": ("middle=50%",)}, UsageError, "matches no linear layer"),
    ({"low_rank": ("mid=50%",), "modules": ("mid",)}, UsageError, "with modules"),
    ({"low_rank": ("mid=2%",)}, SpaError, "one rank"),
    ({"low_rank": ("mid=50%", "mi?=60%")}, UsageError, "nothing to act on")])
def test_what_cannot_be_done_is_said(net, given, error, words):
    with pytest.raises(error, match=words):
        spacompiler.compile(net, (X[:6],), target="params=95%", onnx=False, **OPTIONS, **given)


@pytest.mark.parametrize("given, words", [
    ({"runtime": "vllm"}, "uniform layout.*--for vllm asks for it.*without --for"),
    ({"runtime": "llama.cpp-q8"}, "GGUF.*--for llama.cpp-q8 asks.*without --for"),
    ({"layout": "per-layer"}, "per-layer layout.*use --layout any"),
    ({"gguf": "f16"}, "GGUF.*leave gguf out")])
def test_what_cannot_hold_products_is_said_before_a_model_is_read(given, words):
    with pytest.raises(UsageError, match=f"(?s){words}"):
        Recipe("params=95%", low_rank=("mid=50%",), **given)
