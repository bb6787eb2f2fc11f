"""Networks whose code needs to know the batch: what is traced serves no other, and says so."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.torch_backend.read.export import trace


class Expands(nn.Module):
    """A token for each example; `len` asks for a number."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.token = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.b(self.a(x).relu() + self.token.expand(len(x), -1))


class Truncates(Expands):
    """Computes the batch by a division, of which torch notes what must hold."""

    def forward(self, x):
        y = self.a(x).relu()
        windows = y.unflatten(1, (2, 8)).flatten(0, 1)
        return self.b(windows.view(int(windows.shape[0] / (16 / 8)), -1))


class Free(Expands):
    def forward(self, x):
        return self.b(self.a(x).relu() + self.token)


@pytest.mark.parametrize("kind, fixed", [
    (Expands, [("x", 4)]), (Truncates, [("x", 4)]), (Free, [])])
def test_a_batch_that_the_code_fixes_is_not_dynamic(kind, fixed):
    traced = trace(kind(), (torch.randn(4, 8),))
    assert traced.fixed() == fixed
    assert traced.graph.tensors["x"].dynamic == (frozenset() if fixed else {0})


def test_a_fixed_batch_is_said_and_stands_as_a_number_in_the_file(tmp_path):
    torch.manual_seed(0)
    result = spacompiler.compile(Expands(), (torch.randn(4, 8),), target="body=62%", align=1,
                                 importance="magnitude", latency=False)
    assert "fixes the first dimension of its inputs (4 of x)" in result.job.notes[0]
    result.save(tmp_path / "out")
    (x,) = onnx.load(tmp_path / "out" / "model.onnx").graph.input
    assert [d.dim_value for d in x.type.tensor_type.shape.dim] == [4, 8]
    assert result.module(torch.randn(7, 8)).shape == (7, 4)


@pytest.mark.parametrize("rows, said", [(1, True), (2, False)])
def test_a_single_example_is_said_to_fix_the_batch(rows, said):
    torch.manual_seed(0)
    notes = spacompiler.compile(Free(), (torch.randn(rows, 8),), target="body=62%", align=1,
                                importance="magnitude", latency=False, onnx=False).job.notes
    assert any("are a single example (x)" in note for note in notes) == said
