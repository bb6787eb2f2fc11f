"""Complex numbers as pairs of real ones: what they are a view of keeps whole pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.run.draws import check_draws_nothing


class Turned(nn.Module):
    """Attention whose queries and keys have a part that is turned as complex numbers are."""

    def __init__(self, gap: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 4 * 10) for _ in range(3))
        self.out, self.gap = nn.Linear(4 * 10, 16), gap

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        still, moved = x.split([6, 4], -1)
        pairs = torch.view_as_complex(moved.reshape(*moved.shape[:-1], -1, 2))
        angles = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.3])
        moved = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
        made = x.new_empty(x.shape) if self.gap else None
        if made is None:
            return torch.cat([still, moved.flatten(3)], -1)
        made[..., :6], made[..., 6:] = still, moved.flatten(3)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 10)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (self.turned(q) @ self.turned(k).transpose(-1, -2)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gap", [False, True])
def test_rows_that_hold_pairs_stay_even(gap: bool) -> None:
    torch.manual_seed(0)
    result = spacompiler.compile(  # five of six lie nearest
        Turned(gap).eval(), (torch.randn(2, 5, 16),), target="params~94%", roles=["head dim"],
        only=["q.*"], importance="magnitude", align=1, latency=False, onnx=False)
    (kept,) = result.plan.kept.values()
    assert {len(row) for row in kept} == {4}


def test_memory_that_is_not_yet_written_is_no_draw() -> None:
    found = trace(Turned(gap=True).eval(), (torch.randn(2, 5, 16),))
    check_draws_nothing(found, found.graph)
