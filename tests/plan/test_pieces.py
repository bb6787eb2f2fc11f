"""Halves of one convolution's output: they lose equally many channels, and the class stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spacompiler


class Halves(nn.Module):
    """One half goes through a residual block; all are concatenated (the C2f of detectors)."""

    def __init__(self, how):
        super().__init__()
        self.how, self.width = how, 12
        self.into, self.out = nn.Conv2d(3, 24, 1), nn.Conv2d(36, 4, 1)
        self.a, self.b = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(10, 12, 3, padding=1)

    def forward(self, x):
        y = self.into(x).relu()
        parts = list(y.chunk(2, 1) if self.how == "chunk" else y.split((self.width,) * 2, 1))
        parts.append(parts[-1] + self.b(self.a(parts[-1]).relu()))
        return self.out(torch.cat(parts, 1))


def uneven(how):
    """A network whose first half is worth far more than its second."""
    torch.manual_seed(0)
    net = Halves(how).eval()
    with torch.no_grad():
        net.into.weight[:12].mul_(5)
    return net


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("how", ["chunk", "split"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_halves_of_a_split_lose_equally_many_channels(how, allocation):
    result = spacompiler.compile(uneven(how), (X,), target="params=61%", align=1, onnx=False,
                                 importance="magnitude", allocation=allocation, latency=False)
    assert result.job.emission == "module"
    assert all("no common unit" in note for note in result.job.notes)  # of magnitude, globally
    assert result.module.into.out_channels == 2 * result.module.b.out_channels < 24


@pytest.mark.parametrize("how", ["chunk", "split"])
def test_a_live_network_with_halves_shrinks(how):
    net = uneven(how)
    pruner = spacompiler.Pruner(net, (X,), target="params=61%", importance="magnitude", align=1)
    pruner.finish()
    assert net.into.out_channels == 2 * net.b.out_channels < 24
    assert net(X).shape == (2, 4, 8, 8)
