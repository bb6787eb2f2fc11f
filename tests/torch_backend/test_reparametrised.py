"""Weight norm and spectral norm: the class stays, and its own code computes the cut weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import spacompiler
from spacompiler.artifact.verify import verify

KINDS = {
    "weight norm": parametrizations.weight_norm, "spectral norm": parametrizations.spectral_norm,
    "weight norm over columns": lambda m: parametrizations.weight_norm(m, dim=1),
}
X = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))


def network(kind):
    torch.manual_seed(0)
    made = KINDS[kind]
    net = nn.Sequential(made(nn.Conv1d(4, 32, 3)), nn.ReLU(), made(nn.Conv1d(32, 4, 3)))
    net(X)
    return net.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reparametrised_weight_is_cut_in_its_own_terms(kind, tmp_path):
    dense = network(kind)
    result = spacompiler.compile(dense, (X,), target="params=50%", importance="magnitude",
                                 align=1, onnx=False, latency=False)
    small = result.module
    assert result.job.emission == "module" and small[0].out_channels < 32
    assert type(small[0]) is type(dense[0]) and result.job.proof.error < 1e-10
    result.save(tmp_path / "out")
    again = spacompiler.load(tmp_path / "out", model=network(kind))
    with torch.no_grad():
        assert torch.equal(again(X), small.eval()(X))
    assert all(check.passed for check in verify(tmp_path / "out", network(kind))
               if check.name == "plan identity")


def test_a_repaired_weight_is_written_in_the_same_terms():
    result = spacompiler.compile(network("weight norm"), (X,), target="params=50%",
                                 importance="magnitude", repair="refit", align=1, onnx=False,
                                 latency=False, calibration=[(torch.randn(2, 4, 20),)
                                                             for _ in range(4)])
    assert result.job.emission == "module" and result.job.trace.repaired
