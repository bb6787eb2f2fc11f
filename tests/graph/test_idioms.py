"""Idioms are found as models write them, and not where one step is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from commuting import quick_trace
from torch import Tensor, nn

from spacompiler.graph.idioms import deals, rms_norms

Call = Callable[[Tensor, Tensor], Tensor]


class Calls(nn.Module):
    """A function of an input and a gain."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.gain, self.call = nn.Parameter(torch.rand(6)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.gain)


def root(x: Tensor, dim: int = -1) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-3)


def used_twice(x: Tensor, g: Tensor) -> Tensor:
    y = x * root(x)
    return y * g + y


def mean_used_twice(x: Tensor, g: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + 1e-3) * g + mean


def response_used_twice(x, g):
    y = x / (x.mean(-1, keepdim=True) + 1e-3)
    return x * y * g + y


def root_used_twice(x: Tensor, g: Tensor) -> Tensor:
    r = root(x)
    return x * r * g + r


# a way to write it: the constant added to the gain, or None if it is no RMSNorm
NORMS: dict[str, tuple[Call, float | None]] = {
    "pow": (lambda x, g: x * root(x) * g, 0.0),
    "gain first": (lambda x, g: g * (root(x) * x), 0.0),
    "gain + 1": (lambda x, g: x * root(x) * (g + 1.0), 1.0),
    "1 + gain": (lambda x, g: x * root(x) * (1.0 + g), 1.0),
    "square by hand": (
        lambda x, g: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3) * g, 0.0),
    "eps in front": (
        lambda x, g: x * torch.rsqrt(1e-3 + x.pow(2).mean(-1, keepdim=True)) * g, 0.0),
    "power of -0.5": (
        lambda x, g: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).pow(-0.5) * g, 0.0),
    "last by number": (lambda x, g: x * root(x, 1) * g, 0.0),
    "divided": (lambda x, g: x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * g, 0.0),
    "reciprocal": (
        lambda x, g: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt().reciprocal() * g, 0.0),
    "divided the other way": (
        lambda x, g: (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() / x * g, None),
    "casts": (lambda x, g: g * (x.double() * root(x.double())).float(), 0.0),
    "cast gain": (lambda x, g: (x.double() * root(x.double())).float() * g.double().float(), 0.0),
    "fused": (lambda x, g: torch.rms_norm(x, [6], g, 1e-3), 0.0),
    "response": (lambda x, g: x * (x / (x.mean(-1, keepdim=True) + 1e-3)) * g, 0.0),
    "response, gain in view": (
        lambda x, g: torch.addcmul(x, g.view(1, 6), x * (x / (x.mean(-1, True) + 1e-3))), 0.0),
    "response alone": (lambda x, g: x / (x.mean(-1, keepdim=True) + 1e-3) * g, 0.0),
    "response of another": (lambda x, g: (x + 1) / (x.mean(-1, keepdim=True) + 1e-3) * g, None),
    "response, gain + 1": (lambda x, g: x / (x.mean(-1, keepdim=True) + 1e-3) * (g + 1), None),
    "response the other way": (lambda x, g: (x.mean(-1, keepdim=True) + 1e-3) / x * g, None),
    "response used twice": (response_used_twice, None),
    "no gain": (lambda x, g: x * root(x), None),
    "no stored gain": (lambda x, g: x * root(x) * x, None),
    "gain - 1": (lambda x, g: x * root(x) * (g - 1.0), None),
    "gain + input": (lambda x, g: x * root(x) * (g + x), None),
    "cube": (lambda x, g: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 9.0) * g, None),
    "product": (lambda x, g: x * torch.rsqrt((x * g).mean(-1, keepdim=True) + 9.0) * g, None),
    "other power": (lambda x, g: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).pow(-1.0) * g, None),
    "no root": (lambda x, g: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3) * g, None),
    "no eps": (lambda x, g: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * g, None),
    "rows": (lambda x, g: x * root(x, 0) * g, None),
    "another value": (lambda x, g: (x + 1) * root(x) * g, None),
    "normed value used twice": (used_twice, None),
    "mean used twice": (mean_used_twice, None),
    "root used twice": (root_used_twice, None),
    "fused, no gain": (lambda x, g: torch.rms_norm(x, [6], None, 1e-3), None),
    "fused, two dimensions": (lambda x, g: torch.rms_norm(x, [3, 6], g.expand(3, 6), 1e-3), None),
}


def test_an_eps_that_is_left_out_is_that_of_the_type() -> None:
    call = Calls(lambda x, g: torch.rms_norm(x, [6], g))
    (norm,) = rms_norms(quick_trace(call, torch.rand(3, 6)).graph).values()
    assert (norm.gain, norm.eps) == ("gain", torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("name", NORMS)
def test_rms_norms(name: str) -> None:
    call, offset = NORMS[name]
    found = list(rms_norms(quick_trace(Calls(call), torch.rand(3, 6) + 1).graph).values())
    if offset is None:
        assert not found
        return
    (norm,) = found
    assert (norm.gain, norm.offset, norm.eps) == ("gain", offset, 1e-3)
    assert norm.power == (1.0 if name.startswith("response") else 0.5)
    nodes = {n.name: n for n in quick_trace(Calls(call), torch.rand(3, 6) + 1).graph.nodes}
    assert nodes[norm.eps_node].args[norm.eps_arg] == 1e-3


@pytest.mark.parametrize(("one", "found"), [(1.0, 1), (1, 1), (2.0, 0), (-1.0, 0)])
def test_one_over_a_root(one: float, found: int) -> None:
    """As ONNX writes it: a number in front of the root."""
    graph = quick_trace(Calls(NORMS["reciprocal"][0]), torch.rand(3, 6) + 1).graph
    graph.nodes = [replace(n, op="Div", args=(one, *n.args)) if "reciprocal" in n.op else n
                   for n in graph.nodes]
    assert len(rms_norms(graph)) == found


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    return x.view(3, groups, -1).transpose(1, 2).reshape(3, 6)


def seen(x: Tensor, g: Tensor) -> Tensor:
    parts = x.view(3, 2, 3)
    return parts.transpose(1, 2).reshape(3, 6) + parts.sum()


# a chain of views: the order it deals an axis of six out in, or None
DEALS: dict[str, tuple[Call, list[int] | None]] = {
    "shuffle": (lambda x, g: shuffle(x), [0, 3, 1, 4, 2, 5]),
    "by three": (lambda x, g: shuffle(x, 3), [0, 2, 4, 1, 3, 5]),
    "permute": (lambda x, g: x.view(3, 2, 3).permute(0, 2, 1).reshape(3, 6), [0, 3, 1, 4, 2, 5]),
    "from behind": (lambda x, g: x.view(3, 2, 3).transpose(-1, -2).flatten(1),
                    [0, 3, 1, 4, 2, 5]),
    "copied": (lambda x, g: x.view(3, 3, 2).transpose(2, 1).contiguous().view(3, 6),
               [0, 2, 4, 1, 3, 5]),
    "back again": (lambda x, g: x.view(3, 2, 3).transpose(1, 2).transpose(1, 2).reshape(3, 6),
                   None),
    "split and back": (lambda x, g: x.view(3, 2, 3).reshape(3, 6), None),
    "all at once": (lambda x, g: x.view(6, 3).transpose(0, 1).reshape(3, 6), None),
    "all and back": (lambda x, g: x.view(6, 3).reshape(3, 6), None),
    "other shape": (lambda x, g: x.view(3, 2, 3).transpose(1, 2).reshape(6, 3), None),
    "rows too": (lambda x, g: x.view(3, 3, 2).transpose(0, 1).reshape(3, 6), None),
    "seen between": (seen, None),
    "a step between": (lambda x, g: x.view(3, 2, 3).transpose(1, 2).cos().reshape(3, 6), None),
}


@pytest.mark.parametrize("name", DEALS)
def test_deals(name: str) -> None:
    call, order = DEALS[name]
    found = deals(quick_trace(Calls(call), torch.rand(3, 6)).graph)
    orders = {deal.last: deal.order.tolist() for deal in found.values()}
    assert list(orders.values()) == ([order] if order else [])
