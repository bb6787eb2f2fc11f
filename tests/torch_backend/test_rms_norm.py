"""torch's own RMSNorm module, with what its users leave out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spacompiler

FAST = {"importance": "magnitude", "align": 1, "onnx": False, "latency": False}


def small_values(**options):
    """A network whose normalised values are so small that eps matters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16, **options), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight.mul_(1e-3)
        net[0].bias.mul_(1e-3)
    return net


def test_an_rms_norm_without_eps_shrinks_exactly_and_loads_again(tmp_path):
    net, x = small_values(), torch.randn(5, 8)
    result = spacompiler.compile(net, (x,), target="body=50%", roles=("hidden",), **FAST)
    assert result.job.proof.error < 1e-12 and result.job.emission == "module"
    norm = result.module[1]
    assert norm.eps == pytest.approx(torch.finfo(torch.float32).eps * 16 / norm.weight.numel())
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=small_values())
    with torch.no_grad():
        assert torch.equal(again(x), result.module.eval()(x))


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_an_rms_norm_without_gain_shrinks_when_that_may_be_approximate(eps):
    net, x = small_values(elementwise_affine=False, eps=eps), torch.randn(5, 8)
    (group,) = spacompiler.inspect(net, (x,)).groups.values()
    assert group.role == "hidden" and group.approximate
    result = spacompiler.compile(net, (x,), target="body=50%", roles=("hidden",),
                                 approximate=True, **FAST)
    assert result.job.proof.error < 1e-12 and result.job.proof.approximate > 0
    assert result.module[1].normalized_shape == (result.module[0].out_features,)
