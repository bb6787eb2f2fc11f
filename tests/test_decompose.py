"""Operators without a row are spelt out by ones that have one, and what can't be stays named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from commuting import choose, differences
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

import spacompiler
from spacompiler.emit.program import rewrite
from spacompiler.frontends.aten import TABLE
from spacompiler.frontends.torch_export import Trace, trace
from spacompiler.groups import solve
from spacompiler.proof import TOLERANCE


class Two(nn.Module):
    """A function of two arrays, made from the input so that they vary with the batch."""

    def __init__(self, call: Callable[..., object]) -> None:
        super().__init__()
        self.call, self.a, self.b = call, nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        return self.call(self.a(x), self.b(x))


def traced(call: Callable[..., object]) -> tuple[Trace, list[torch.Tensor]]:
    torch.manual_seed(0)
    module, x = Two(call).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    found = trace(module, (x,))
    with torch.no_grad():
        return found, list(torch.utils._pytree.tree_leaves(module(x)))


SPELT = {
    "rot90": lambda a, b: a.rot90(1, (1, 2)),
    "tensordot": lambda a, b: torch.tensordot(a, b, ([1, 2], [1, 2])),
    "hstack": lambda a, b: torch.hstack([a, b.exp()]),
    "aminmax": lambda a, b: [*a.aminmax(dim=1), *b.aminmax(dim=1)],
    "nansum": lambda a, b: (a + b).nansum(2),
    "ldexp": lambda a, b: torch.ldexp(a, b),
    "mse_loss": lambda a, b: nn.functional.mse_loss(a, b, reduction="none"),
    "diag_embed": lambda a, b: torch.diag_embed(a),
    "one of several": lambda a, b: a.hsplit(5)[1],
}


@pytest.mark.parametrize("name", SPELT)
def test_an_operator_is_spelt_out(name: str) -> None:
    found, want = traced(SPELT[name])
    assert {node.op for node in found.graph.nodes if TABLE.get(node.op) is None
            and list(node.refs())} == set()
    rest = [node for node in found.graph.nodes if node.op != "aten.linear.default"]
    assert rest and all(node.source for node in rest)  # the place in the user's code is known
    got = found.program.module()(*found.args)
    assert all(torch.allclose(x, y, 1e-12) for x, y in
               zip(torch.utils._pytree.tree_leaves(got), want, strict=True))
    found.graph.outputs = []
    solution, rng = solve(found.graph, TABLE), np.random.default_rng(0)
    assert any(group.size > 1 for group in solution.groups.values()) == (name != "diag_embed")
    for _ in range(3):
        errors = differences(found, solution, choose(solution, rng))
        assert max(errors.values()) <= TOLERANCE


def test_what_cannot_be_spelt_out_is_named() -> None:
    found, _ = traced(lambda a, b: torch.linalg.svdvals(a) + b[:, 0, :5])
    solution = solve(found.graph, TABLE)
    assert "linalg_svd" in solution.solver.opaque[0].op
    assert solution.groups == {}


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
