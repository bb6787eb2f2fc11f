"""Which role a group gets where activations meet activations: channel, head or head dim."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spacompiler

FAST = {"importance": "magnitude", "align": 1, "onnx": False, "latency": False}


class State(nn.Module):
    """A selective state space: channels beside a state that two activations contract."""

    def __init__(self):
        super().__init__()
        self.into, self.b, self.c = nn.Linear(16, 24), nn.Linear(16, 6), nn.Linear(16, 6)
        self.out = nn.Linear(24, 4)

    def forward(self, x):
        x, b, c = self.into(x), self.b(x), self.c(x)
        h = torch.einsum("bld,bln->bldn", x.sigmoid(), b).cumsum(1)
        return self.out(torch.einsum("bldn,bln->bld", h, c))


class Relative(nn.Module):
    """Attention with relative positions: one operand of the second product has no heads."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv, self.out, self.rel = nn.Linear(32, 96), nn.Linear(32, 32), nn.Embedding(12, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(x.shape[1])
        r = self.rel(i[:, None] - i[None] + 6)
        s = q @ k.transpose(-1, -2) + torch.einsum("bhnd,nrd->bhnr", q, r)
        return self.out((s.softmax(-1) @ v).transpose(1, 2).flatten(2))


class OneKey(Relative):
    """All heads of the query share one key and one value (multi-query attention)."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).split([32, 8, 8], -1)
        s = torch.einsum("bnhd,bmd->bhnm", q.unflatten(-1, (self.heads, -1)), k)
        return self.out(torch.einsum("bhnm,bmd->bnhd", s.softmax(-1), v).flatten(2))


class NonLocal(nn.Module):
    """Positions of an image are mixed by similarity; there are no heads."""

    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(8, n, 1) for n in (6, 6, 12))
        self.out = nn.Conv2d(12, 8, 1)

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.theta, self.phi, self.g))
        y = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return self.out(y.unflatten(-1, x.shape[-2:]))


class Neighbours(nn.Module):
    """A graph convolution with a dense matrix of neighbours that is an input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, x, near):
        return near @ self.second((near @ self.first(x)).relu())


NEAR = torch.rand(2, 5, 5)
CASES = {
    "state": (State, (torch.randn(2, 5, 16),),
              {"into.weight:0": "channel", "b.weight:0": "head dim"}),
    "relative": (Relative, (torch.randn(2, 5, 32),),
                 {"qkv.weight:0.0": "head", "qkv.weight:0.1": "head dim",
                  "qkv.weight:0.2": "head dim"}),
    "one key": (OneKey, (torch.randn(2, 5, 32),),
                {"qkv.weight:0.0": "head", "qkv.weight:0.1": "head dim",
                 "qkv.weight:0.2": "head dim"}),
    "non-local": (NonLocal, (torch.randn(2, 8, 4, 4),),
                  {"theta.weight:0": "head dim", "g.weight:0": "channel"}),
    "neighbours": (Neighbours, (torch.randn(2, 5, 8), NEAR), {"first.weight:0": "channel"}),
}


@pytest.mark.parametrize("name", CASES)
def test_roles_of_products_of_activations(name):
    make, inputs, roles = CASES[name]
    torch.manual_seed(0)
    net = make().eval()
    found = spacompiler.inspect(net, inputs).groups
    assert {group.name: group.role for group in found.values()} == roles
    free = sum(role in ("channel", "head") for role in roles.values())
    target = {"relative": "params=76%", "non-local": "params=79%"}.get(name, "params=80%")
    result = spacompiler.compile(net, inputs, target=target, **FAST)
    assert len(result.plan.kept) == free and result.job.proof.error < 1e-10
