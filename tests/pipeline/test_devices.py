"""Calibration, proof and training on another device give what they give on the processor."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spacompiler
from spacompiler.errors import UsageError
from spacompiler.models_zoo import load

# Runs by itself: the stand-in for a device changes its process for good.
SCRIPT = '''
import warnings
import torch
from torch import nn
import far
far.be_there()
import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.where import devices, find, has_double

warnings.simplefilter("ignore")
assert devices() == ["far:0", "cpu"]
assert str(find("auto", "auto").device) == str(find("far", "float32").device) == "far:0"
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                    nn.Linear(128, 16), nn.LayerNorm(16), nn.Linear(16, 5))
x = torch.randn(32, 3, 6, 6)
common = dict(target="params~60%", align=1, calibration=[(p,) for p in x.split(8)], onnx=False,
              latency=False, allocation="uniform")
WAYS = {
    "gates": dict(importance="taylor", repair="refit(sequential=True, residual=True)"),
    "curvature": dict(importance="curvature", allocation="measured", repair="batch-norm",
                      recovery="full(epochs=1, logits=1.0)"),
    "forward": dict(importance="fluctuation", repair="bias", dtype="float32"),
    "compared": dict(importance="taylor", allocation="distortion"),
}

def made(way, device):
    return spacompiler.compile(net, (x[:4],), device=device, **{**common, **WAYS[way]})

for way in WAYS:  # proofs on the device, and where it has no float64 on the processor
    far.LIMITS["double"] = way != "curvature"
    has_double.cache_clear()
    here, there = made(way, "cpu"), made(way, "far")
    assert here.plan.kept == there.plan.kept, way
    assert there.job.proof.holds, way
    for name, a in here.module.state_dict().items():
        b = there.module.state_dict()[name]
        assert b.device.type == "cpu" and torch.allclose(a, b, atol=1e-4), (way, name)
assert {p.device.type for p in net.parameters()} == {"cpu"}

far.LIMITS["double"] = False
has_double.cache_clear()
try:
    find("far", "float64")
except UsageError as problem:
    assert "no float64" in str(problem)
else:
    raise AssertionError("float64")

far.LIMITS["bytes"] = 4000
try:
    made("gates", "far")
except SpaError as problem:
    assert "far:0 has too little memory" in str(problem) and "--batch" in str(problem), problem
else:
    raise AssertionError("memory")
print("all well")
'''


def test_another_device_gives_the_same_plan_and_weights() -> None:
    beside = Path(__file__).parents[1] / "help"
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                          check=False, cwd=beside)
    assert done.stdout.endswith("all well\n"), done.stderr[-3000:]


def test_a_device_that_is_not_there_is_refused_with_what_is() -> None:
    net, inputs = load("mlp").build()
    with pytest.raises(UsageError, match="no device 'cuda:7' here") as caught:
        spacompiler.compile(net, inputs, target="params=60%", device="cuda:7")
    assert "finds" in caught.value.why and "cpu" in caught.value.why
    with pytest.raises(UsageError, match="cannot read device"):
        spacompiler.Recipe("params=60%", device="GPU 1")
