"""Sizes held by the user's own code: which attributes are found, and what is left alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.torch_backend import backend
from spacompiler.torch_backend.emit.attributes import assign, differing, held, watch
from spacompiler.torch_backend.emit.sized import Sized

FAST = {"importance": "magnitude", "align": 1, "onnx": False, "latency": False}


class Attention(nn.Module):
    """Heads split by sizes that `sizes` holds; a subclass says where they are kept."""

    def __init__(self, width=24, heads=4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.keep(heads, width // heads)

    def split(self, x, heads, dims):
        return x.view(*x.shape[:-1], heads, dims).transpose(1, 2)

    def forward(self, x):
        heads, dims = self.sizes()
        q, k, v = (self.split(f(x), heads, dims) for f in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(y.reshape(x.shape[0], x.shape[1], heads * dims))


class Plain(Attention):
    def keep(self, heads, dims):
        self.heads, self.all = heads, heads * dims

    def sizes(self):
        return self.heads, self.all // self.heads


class InTuple(Attention):
    def keep(self, heads, dims):
        self.shape = (heads, dims)

    def sizes(self):
        return self.shape


class InConfig(Attention):
    config = SimpleNamespace(heads=4, dims=6)

    def keep(self, heads, dims):
        self.config = InConfig.config

    def sizes(self):
        return self.config.heads, self.config.dims


class Conflict(Attention):
    """One number says both how many heads there are and how wide they are."""

    def keep(self, heads, dims):
        self.number = 4

    def sizes(self):
        return self.number, self.number

    def __init__(self):
        super().__init__(16)


class FromWidth(Attention):
    def keep(self, heads, dims):
        self.heads = heads

    def forward(self, x):
        self.width = x.shape[-1]
        return super().forward(x)

    def sizes(self):
        return self.heads, 24 // self.heads


class Twice(nn.Module):
    """Two layers that share a configuration, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = InConfig(), InConfig()

    def forward(self, x):
        return self.b(self.a(self.b(x)))


def compiled(module, width=24, **options):
    torch.manual_seed(0)
    return spacompiler.compile(module, (torch.randn(2, 5, width),), target="params=50%",
                               **FAST, **options)


@pytest.mark.parametrize("kind", [Plain, InTuple, InConfig, Twice])
def test_a_module_that_holds_sizes_stays_a_module(kind, tmp_path):
    torch.manual_seed(1)
    dense = kind()
    result = compiled(dense)
    assert (result.job.emission, result.job.notes) == ("module", [])
    assert type(result.module) is kind
    assert vars(InConfig.config) == {"heads": 4, "dims": 6}
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=kind())
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        assert torch.equal(again(x), result.module.eval()(x))


@pytest.mark.parametrize("kind, width, why", [
    (Conflict, 16, "number = 4 stands for two sizes"),
    (FromWidth, 24, "attributes cannot say so"),
])
def test_a_size_that_no_attribute_can_say_is_named(kind, width, why):
    result = compiled(kind(), width)
    assert result.job.emission == "program"
    assert why in result.job.notes[0]


@pytest.mark.parametrize("options", [
    {"batch_first": True}, {"bias": False}, {"kdim": 24, "vdim": 24, "batch_first": True},
    {"add_bias_kv": True, "batch_first": True}, {"add_zero_attn": True}])
def test_stock_attention_loses_heads(options, tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 4, **options)

        def forward(self, x):
            mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1) \
                if options.get("batch_first") else None  # positions come first otherwise
            return self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]

    torch.manual_seed(1)
    result = compiled(Block())
    assert result.job.emission == "module" and result.module.attention.num_heads == 2
    assert isinstance(result.module.attention, nn.MultiheadAttention)
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=Block())
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        assert torch.equal(again(x), result.module.eval()(x))
        attention, x = result.module.attention, x[0]
        for one in (x, x[None]):
            got, weights = attention(one, one, one)
            assert torch.allclose(got, attention(one, one, one, need_weights=False)[0], atol=1e-6)
            keys = one.shape[-2] + ("add_bias_kv" in options)
            assert weights.shape == (*one.shape[:-1], keys) or not options.get("batch_first")


def test_a_stock_encoder_layer_loses_heads():
    torch.manual_seed(1)
    dense = nn.TransformerEncoderLayer(24, 4, 32, batch_first=True, dropout=0.0).eval()
    result = compiled(dense)
    assert result.job.emission == "module" and result.module.self_attn.num_heads < 4


class Recurrent(nn.Module):
    """Stock recurrent layers: stacked both ways, projected, one step at a time."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.lstm = nn.LSTM(16, 12, 2, batch_first=True, bidirectional=True)
        self.gru, self.rnn = nn.GRU(24, 16, bias=False), nn.RNN(16, 12, nonlinearity="relu")
        self.projected = nn.LSTM(12, 12, proj_size=6)
        self.cell, self.out = nn.LSTMCell(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        y = self.projected(self.rnn(self.gru(self.lstm(self.embed(x))[0])[0])[0])[0]
        state = None
        for step in y.unbind(1):
            state = self.cell(step, state)
        return self.out(state[0])


def test_stock_recurrent_layers_lose_hidden_units(tmp_path):
    torch.manual_seed(1)
    result = compiled(Recurrent())
    small = result.module
    (note,) = result.job.notes  # the layer with projections takes the first dimension for time
    assert result.job.emission == "module" and "fixes the first dimension" in note
    sizes = [small.embed.out_features, small.lstm.hidden_size, small.gru.hidden_size,
             small.rnn.hidden_size, small.projected.proj_size, small.cell.hidden_size]
    assert all(k < n for k, n in zip(sizes, (16, 12, 16, 12, 6, 10), strict=True))
    assert small.projected.hidden_size == 12  # told apart from what is fed back by its size
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=Recurrent())
    x = torch.randn(3, 5, 24)
    with torch.no_grad():
        assert torch.equal(again(x), small.eval()(x))
        assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_numbers_are_found_in_containers_and_set_without_touching_what_is_shared():
    shared = SimpleNamespace(width=8, flag=True, name="x", deep=SimpleNamespace(size=3))
    module = nn.Module()
    module.window, module.config, module._hidden, module.many = (7, 5), shared, 9, [1, 2]
    assert dict(held(module)) == {"window.0": 7, "window.1": 5, "config.width": 8,
                                  "config.deep.size": 3, "_hidden": 9, "many.0": 1, "many.1": 2}
    other = nn.Module()
    other.window, other.config, other._hidden, other.many = (7, 5), shared, 9, [1, 2]
    for name, value in (("window.1", 4), ("config.deep.size", 2), ("config.width", 6)):
        assign(other, name, value)
    assert (other.window, other.config.deep.size, other.config.width) == ((7, 4), 2, 6)
    assert (shared.width, shared.deep.size, module.window) == (8, 3, (7, 5))
    assert sorted(differing(module, other)) == [
        ("", "config.deep.size", 2), ("", "config.width", 6), ("", "window.1", 4)]


def test_marks_survive_arithmetic():
    a, b = Sized.held(6, ("", "a")), Sized.held(4, ("m", "b"))
    made = (3 * a + b) // 2 - 1 % a
    assert made == 10
    assert made.value({("", "a"): 2, ("m", "b"): 10}) == 7
    assert made.keys == {("", "a"), ("m", "b")}


class Widths(NamedTuple):
    """Sizes by name."""

    heads: int
    dims: int


@dataclass(slots=True)
class Slots:
    """Sizes without a dict."""

    heads: int
    dims: int


class InNamedTuple(InTuple):
    def keep(self, heads, dims):
        self.shape = Widths(heads, dims)


class InDict(Attention):
    def keep(self, heads, dims):
        self.shape = {"heads": heads, "dims": dims}

    def sizes(self):
        return self.shape["heads"], self.shape["dims"]


class InSlots(Attention):
    def keep(self, heads, dims):
        self._shape = Slots(heads, dims)

    def sizes(self):
        return self._shape.heads, self._shape.dims


@cache
def cached(heads, dims):
    return [heads, dims]


class InCache(InTuple):
    """A function that returns what it gave for equal numbers before."""

    def split(self, x, heads, dims):
        return x.view(*x.shape[:-1], *cached(heads, dims)).transpose(1, 2)


class Compared(nn.Module):
    """Sizes that only comparisons read; the second is a list of what may come."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.width, self.also = 16, [12, 5]

    def forward(self, x):
        y = self.a(x).relu()
        assert y.shape[-1] == self.width
        z = self.b(y).relu()
        if z.shape[-1] not in self.also:
            raise ValueError("unexpected width")
        return self.c(z)


@pytest.mark.parametrize("kind", [InNamedTuple, InDict, InSlots, InCache, Compared])
def test_sizes_in_containers_caches_and_comparisons_are_brought_in_step(kind, tmp_path):
    torch.manual_seed(1)
    result = compiled(kind())
    assert (result.job.emission, result.job.notes) == ("module", [])
    assert type(result.module) is kind
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=kind())
    x = torch.randn(3, 7, 24)
    with torch.no_grad():
        assert torch.equal(again(x), result.module.eval()(x))


def test_a_bare_assert_is_named_by_its_line():
    class Literal(Compared):
        def forward(self, x):
            y = self.a(x).relu()
            if y.shape[-1] != 16:
                raise AssertionError
            return self.c(self.b(y).relu())

    result = compiled(Literal())
    assert result.job.emission == "program"
    assert "AssertionError: raise AssertionError (torch_backend/test_attributes.py" \
        in result.job.notes[0]


@pytest.mark.parametrize("asks", [False, True])
def test_sizes_are_watched_without_data_where_code_asks_for_none(asks: bool) -> None:
    ran = []

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.layer = 3, nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(x.device.type)
            if asks and x.sum() > 1e9:
                return x
            return self.layer(x).view(len(x), self.heads, -1)

    seen = watch(Heads().eval(), (torch.randn(2, 4),), {})
    assert ran == (["meta", "cpu"] if asks else ["meta"])
    assert ("", "heads") in {key for use in seen.uses for key in use.size.keys}


@pytest.mark.parametrize(("net", "first"), [
    (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)), "_surgery"),
    (Plain(), "_watched")], ids=["stock classes", "code"])
def test_where_code_holds_sizes_it_is_watched_before_anything_is_tried(net, first):
    x = torch.randn(2, 3, 9, 9) if first == "_surgery" else torch.randn(2, 5, 24)
    made = spacompiler.compile(net.eval(), (x,), target="params~60%", dry_run=True, **FAST).job
    ways = [make for layout, _, make in backend.emitters(made.subject, made.decided)
            if layout == "any"]
    assert ways[0].__name__ == first
    assert sorted(map(repr, ways)) == sorted(repr(m) for w, _, m in backend.EMITTERS if w == "any")
