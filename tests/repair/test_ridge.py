"""Ridge regression by Cholesky factors: the closed form by eigenvectors, at a part of its price."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch

import spacompiler
from spacompiler.evidence.statistics import Covariance
from spacompiler.passes import refit
from spacompiler.passes.refit import Refit
from spacompiler.repair import ridge
from spacompiler.repair.evidence import Evidence, Told, of_dense
from spacompiler.stages.tolerances import SOLVED

FEATURES, OUTPUTS = 90, 24
KEPT = torch.arange(FEATURES) % 3 > 0


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit, "SMALL", 8)


def seen(samples: int, noise: float) -> tuple[torch.Tensor, Evidence]:
    """W and what `samples` say of a product W x whose features predict each other."""
    torch.manual_seed(0)
    x = torch.randn(samples, 20) @ torch.randn(20, FEATURES) + noise * torch.randn(
        samples, FEATURES) + 0.5
    covariance = Covariance()
    covariance.add(x.double().unsqueeze(0), 1)
    weight = torch.randn(OUTPUTS, FEATURES).double()
    return weight, of_dense(covariance, weight, 0)


def by_eigenvectors(which: Refit, weight: torch.Tensor, evidence: Evidence,
                    has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refit, "SMALL", FEATURES)
        return which.solve(weight, evidence, KEPT, has_bias=has_bias)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("samples", "noise"), [(40, 3.0), (300, 0.3), (4000, 1.0), (600, 8.0)])
@pytest.mark.parametrize("which", [Refit(), Refit(damping=0.2)])
def test_factors_give_the_closed_form(which: Refit, samples: int, noise: float,
                                      has_bias: bool) -> None:
    weight, evidence = seen(samples, noise)
    want, shift = by_eigenvectors(which, weight, evidence, has_bias)
    made, b = which.solve(weight, evidence, KEPT, has_bias=has_bias)
    torch.testing.assert_close(made, want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(b, shift, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(evidence.cross, evidence.gram @ weight.T)
    once = replace(evidence, single=True, told=Told(), shared={})
    short, _ = which.solve(weight, once, KEPT, has_bias=has_bias)
    off = float((short - want).norm() / (want - weight).norm().clamp(min=1e-300))
    assert torch.equal(short, weight) if torch.equal(want, weight) else \
        off < 4 * once.told.error + 1e-12 and once.told.error < SOLVED.value


def test_where_float32_is_too_coarse_float64_solves() -> None:
    weight, evidence = seen(4000, 1e-5)
    which = Refit(damping=1e-9)
    want, _ = by_eigenvectors(which, weight, evidence, False)
    once = replace(evidence, single=True)
    made, _ = which.solve(weight, once, KEPT, has_bias=False)
    assert isnan(once.told.error)
    torch.testing.assert_close(made, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 7, 8, 20])
def test_a_factor_by_blocks_is_the_factor(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "BLOCK", 8)
    x = torch.randn(40, size, dtype=torch.float64)
    torch.testing.assert_close(ridge.cholesky(x.T @ x), torch.linalg.cholesky(x.T @ x))
    assert ridge.cholesky(x.T @ x - 1000 * torch.eye(size)) is None


def test_the_valley_is_found_from_either_side() -> None:
    errors = [9.0, 8.0, 5.0, 6.0, 7.0, 7.5, 8.0]
    assert [ridge._valley(errors.__getitem__, 7, at) for at in (0, 2, 6)] == [2, 2, 2]
    flat = [float("inf")] * 4 + [3.0]
    assert ridge._valley(flat.__getitem__, 5, 0) == 4, "where all is infinite, a larger ridge"


class Gated(torch.nn.Module):
    """Two products read what a third one makes."""

    def __init__(self) -> None:
        super().__init__()
        self.make = torch.nn.Linear(16, 40)
        self.one, self.other = torch.nn.Linear(40, 12), torch.nn.Linear(40, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.make(x).relu()
        return self.one(x) * self.other(x)


def test_sites_that_read_the_same_share_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x, made = Gated(), torch.randn(256, 16), []
    plain = ridge.Factors.of

    def counted(self: ridge.Factors, *which: object) -> object:
        made.append((id(self), which)) if which not in self._made else None
        return plain(self, *which)  # type: ignore[arg-type]

    monkeypatch.setattr(ridge.Factors, "of", counted)
    result = spacompiler.compile(net, (x[:4],), target="params=70%", repair="refit(damping=0.1)",
                                 calibration=[(x,)], align=1, onnx=False, latency=False)
    assert len(made) == 1
    assert any("2 of 2 least squares were solved in float32" in n for n in result.job.notes)
