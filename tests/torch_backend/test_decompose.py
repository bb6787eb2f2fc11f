"""Operators without a row are spelt out by ones that have one, and what can't be stays named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from commuting import choose, differences
from torch import nn

from spacompiler.groups.solution import solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.tolerances import PROOF
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run.runner import Runner
from spacompiler.torch_backend.trace import Trace


class Two(nn.Module):
    """A function of two arrays, made from the input so that they vary with the batch."""

    def __init__(self, call: Callable[..., object]) -> None:
        super().__init__()
        self.call, self.a, self.b = call, nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        return self.call(self.a(x), self.b(x))


def traced(call: Callable[..., object], quick: bool = False) -> tuple[Trace, list[torch.Tensor]]:
    torch.manual_seed(0)
    module, x = Two(call).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    found = trace(module, (x,), quick=quick)
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


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", SPELT)
def test_an_operator_is_spelt_out(name: str, quick: bool) -> None:
    found, want = traced(SPELT[name], quick)
    assert {node.op for node in found.graph.nodes if TABLE.get(node.op) is None
            and list(node.refs())} == set()
    rest = [node for node in found.graph.nodes if node.op != "aten.linear.default"]
    assert rest and all(node.source for node in rest)  # the place in the user's code is known
    got = Runner(found.program).call(found.args, {})
    assert all(torch.allclose(x, y, 1e-12) for x, y in zip(got, want, strict=True))
    found.graph.outputs = []
    solution, rng = solve(found.graph, TABLE), np.random.default_rng(0)
    assert any(group.size > 1 for group in solution.groups.values()) == (name != "diag_embed")
    for _ in range(3):
        errors = differences(found, solution, choose(solution, rng))
        assert max(errors.values()) <= PROOF.value


def test_what_cannot_be_spelt_out_is_named() -> None:
    found, _ = traced(lambda a, b: torch.linalg.svdvals(a) + b[:, 0, :5])
    solution = solve(found.graph, TABLE)
    assert "linalg_svd" in solution.solver.opaque[0].op
    assert solution.groups == {}
