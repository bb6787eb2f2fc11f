"""Weights read only through statistics of themselves: their channels go, the result is exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import spacompiler
from spacompiler.torch_backend.read.export import trace


class Standardised(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class ByDeviation(nn.Conv2d):
    def forward(self, x):
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=self.padding)


KINDS = {
    "standardised by a batch norm": lambda i, o: Standardised(i, o, 3, padding=1),
    "standardised by deviations": lambda i, o: ByDeviation(i, o, 3, padding=1),
    "weight norm": lambda i, o: weight_norm(nn.Conv2d(i, o, 3, padding=1)),
    "spectral norm": lambda i, o: spectral_norm(nn.Conv2d(i, o, 3, padding=1)),
}


def _network(make, wide=0):
    torch.manual_seed(0)
    rest = [nn.Flatten(), nn.Linear(8 * 64, wide), nn.Linear(wide, 2)] if wide else []
    return nn.Sequential(make(3, 16), nn.ReLU(), make(16, 16), nn.ReLU(), make(16, 8), *rest).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_channel_between_goes_with_a_proof(kind, tmp_path):
    net, x = _network(KINDS[kind]), torch.randn(2, 3, 8, 8)
    want = net(x)
    traced = trace(net, (x,))
    names = {name for name, _ in net.named_parameters() if name.endswith(("weight", "original"))}
    assert len(traced.folded) >= 3 and (names & set(traced.folded) or "norm" in kind)
    result = spacompiler.compile(net, (x,), target="params=50%", importance="magnitude", align=1,
                                 onnx=False, latency=False)
    sizes = [g.size for g in result.job.solution.groups.values()]
    assert sizes == [16, 16]
    assert result.job.proof.holds
    assert result.job.emission == ("program" if "standardised" in kind else "module")
    assert any("computed once" in note for note in result.job.notes)
    torch.testing.assert_close(net(x), want)
    result.save(tmp_path / "made")
    torch.testing.assert_close(spacompiler.load(tmp_path / "made", model=net)(x), result.module(x))


def test_a_small_part_of_a_network_is_left_to_its_code():
    net, x = _network(KINDS["weight norm"], wide=128), torch.randn(2, 3, 8, 8)
    assert trace(net, (x,)).folded == ()
    result = spacompiler.compile(net, (x,), target="params=60%", importance="magnitude", align=1,
                                 onnx=False, latency=False)
    assert result.job.emission == "module"
