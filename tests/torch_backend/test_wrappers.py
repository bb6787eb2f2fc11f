"""Wrappers are entered, and control flow freezes by its name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import spacompiler
from spacompiler.torch_backend.emit.program import rewrite


class Wrapped(nn.Module):
    """Four layers; a subclass says what stands between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.c, self.d = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.d(self.c(self.b(self.between(self.a(x)))))


class NoGrad(Wrapped):
    def between(self, h):
        with torch.no_grad():
            return h.relu()


class Autocast(Wrapped):
    def between(self, h):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = nn.functional.linear(h, self.b.weight).relu()
        return nn.functional.linear(h.float(), self.b.weight.T)


class Checkpoint(Wrapped):
    def between(self, h):
        return checkpoint(torch.relu, h, use_reentrant=False)


class Branches(Wrapped):
    def between(self, h):
        return torch.cond(h.sum() > 0, torch.relu, torch.sigmoid, (h,))


class Mapped(Wrapped):
    def between(self, h):
        return torch._higher_order_ops.map(torch.relu, h)


class Scanned(Wrapped):
    def between(self, h):
        return scan(lambda c, row: (c + row, c * row), torch.zeros_like(h[0]), h, dim=0)[1]


class Looped(Wrapped):
    def between(self, h):
        return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 0.5),
                          (torch.tensor(0), h))[1]


@pytest.mark.parametrize("kind, op", [
    (NoGrad, ""), (Autocast, ""), (Checkpoint, ""), (Branches, "cond"), (Mapped, "map_impl"),
    (Scanned, "scan"), (Looped, "while_loop")])
def test_wrappers_are_entered_and_control_flow_is_frozen_by_name(kind, op) -> None:
    torch.manual_seed(0)
    module, x = kind(), torch.randn(4, 8)
    result = spacompiler.compile(module, (x,), target="params=70%", importance="magnitude",
                                 align=1, onnx=False, latency=False)
    job = result.job
    assert job.emission == "module" and job.proof.holds
    assert ("a.weight:0" in result.solution.groups) == (not op)
    frozen = {(name, d): why for name, d, why in result.solution.frozen()}
    assert not op or f"{op} in" in frozen["a.weight", 0][0]
    assert not op or "its branches are not entered" in frozen["a.weight", 0][0]
    program = rewrite(job.trace, job.solution, job.choices).module()
    with torch.no_grad():
        assert torch.allclose(program(x), result.module.eval()(x), atol=1e-5)
