"""Covariances are summed up above a diagonal of blocks, and say the whole product."""

from __future__ import annotations

import pytest
import torch

from spacompiler.errors import SpaError
from spacompiler.evidence import statistics, surgeon
from spacompiler.evidence.statistics import Covariance


@pytest.mark.parametrize("features", [4, 11, 12])
def test_blocks_say_the_whole_product_after_each_batch(
        features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 4)
    monkeypatch.setattr(statistics, "ROWS", 3)
    torch.manual_seed(0)
    found, batches = Covariance(), torch.randn(3, 2, 9, features)
    for seen, batch in enumerate(batches, 1):
        found.add(batch, 1)
        x = batches[:seen].transpose(0, 1).flatten(1, 2).double()
        torch.testing.assert_close(found.gram, x.mT @ x, rtol=1e-5, atol=1e-5)


def test_what_lies_below_the_diagonal_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 4)
    _, _, _, *products = Covariance().of(torch.randn(1, 9, 12), 1, None)
    assert [tuple(p.shape) for p in products] == [(1, 4, 12), (1, 4, 8), (1, 4, 4)]


@pytest.mark.parametrize(("rows", "why"), [
    (torch.full((1, 8, 6), float("nan")), "NaN or infinity"),
    (torch.linspace(0.1, 0.7, 6).expand(1, 8, 6) * 1e8, "all alike")])
def test_moments_without_an_inverse_are_refused(rows: torch.Tensor, why: str) -> None:
    seen = Covariance()
    seen.add(rows, 1)
    with pytest.raises(SpaError, match=why):
        surgeon._inverse(seen, 0, True, 1e-30)
