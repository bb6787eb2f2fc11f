"""Where removal changes statistics, the group says so, or nothing goes: which, and why."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from commuting import quick_trace, table_of
from networks import network
from torch import nn

from spacompiler.axes.choices import Choice
from spacompiler.axes.expressions import atoms, reasons, show
from spacompiler.groups.solution import solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.proof import relative_error
from spacompiler.torch_backend.prove import masked_dense

ROW = "x: 2x4\na = linear(x, out=6)\n"
TOKENS = "x: 2x5x8\na = linear(x, out=6)\n"
IMAGE = "x: 2x3x4x4\na = conv(x, out=6, kernel=1, groups=1)\n"

# name: (network, expression of the first layer's rows, exact, what the group or the axis says)
ROWS = {
    "layer_norm": (ROW + "b = layer_norm(a)", "6", False, "change with the width"),
    "rms_norm": (ROW + "b = rms_norm(a, offset=0, cast=False)", "6", True, ""),
    "rms_norm, gain + 1": (ROW + "b = rms_norm(a, offset=1, cast=True)", "6", True, ""),
    "response_norm": (TOKENS + "b = response_norm(a, how='mul')", "6", True, ""),
    "response_norm, fused": (TOKENS + "b = response_norm(a, how='addcmul')", "6", True, ""),
    "batch_norm": (IMAGE + "b = batch_norm(a)", "6", True, ""),
    "instance_norm": (IMAGE + "b = instance_norm(a)", "6", True, ""),
    "group_norm": (IMAGE + "b = group_norm(a, groups=2)", "2*3", False, "taken over a group"),
    "group_norm of one group": (IMAGE + "b = group_norm(a, groups=1)", "6", False,
                                "taken over a group"),
    "group_norm of single channels": (IMAGE + "b = group_norm(a, groups=6)", "6", True, ""),
    "mean over channels": (TOKENS + "b = reduce(a, dim=2, how='mean', keep=False)", "6!", True,
                           "depends on how many slices"),
    "mean over tokens": (TOKENS + "b = reduce(a, dim=1, how='mean', keep=False)", "6", True, ""),
    "sum over channels": (TOKENS + "b = reduce(a, dim=2, how='sum', keep=False)", "6", True, ""),
    "largest over channels": (TOKENS + "b = reduce(a, dim=2, how='amax', keep=False)", "6!", True,
                              "depends on how many slices"),
    "softmax": (ROW + "b = softmax(a, dim=1)", "6!", True, "works along it"),
    "cumsum": (ROW + "b = cumsum(a, dim=1)", "6!", True, "works along it"),
    "reflected": (TOKENS + "b = pad_copies(a, mode='reflect')", "6!", True, "copies positions"),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_changes_statistics_says_so(name: str) -> None:
    text, want, exact, said = ROWS[name]
    net = network(text)
    found = quick_trace(net, net.example())
    solution = solve(found.graph, TABLE)
    rows = solution.dims("a_0")[0]
    assert show(rows) == want
    groups = [g for g in solution.groups.values() if g.atom in atoms(rows)]
    assert any(bool(g.approximate) != exact for g in groups) or not groups
    normed = any(norm in name for norm in ("layer_norm", "rms_norm"))
    assert {g.role for g in groups} <= {"hidden" if normed else "channel"}
    notes = [*reasons(rows), *(why for g in groups for why in g.approximate)]
    assert any(said in note for note in notes) if said else not notes
    if not groups:
        return
    choices = {g.atom: Choice(table_of(np.random.default_rng(0), g.shape, g.size - 1), g.outers)
               for g in groups}
    masked = [masked_dense(found, solution, choices, renormalise=again) for again in (True, False)]
    assert (relative_error(*masked) < 1e-12) == exact


class _Boxes(nn.Module):
    """A head that the example inputs give nothing to: what it computes cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x):
        h = self.body(x)
        return h, self.head(h[:0])


def test_what_the_example_inputs_give_nothing_to_is_frozen():
    solution = solve(quick_trace(_Boxes(), torch.randn(3, 4)).graph, TABLE)
    assert {m.weight for g in solution.groups.values() for m in g.members} == {
        "body.0.weight", "body.0.bias", "body.2.weight"}
    frozen = solution.dims("head.0.weight")[0]
    assert "not used" in " ".join(reasons(frozen))
