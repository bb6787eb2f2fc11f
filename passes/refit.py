"""Refit: least squares for the weights that stay, a bias for the mean, or both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from spacompiler.repair.evidence import Evidence
from spacompiler.repair.ridge import SMALL, Factors, Missed, best, solution

GRID = tuple(10.0 ** (i / 2) for i in range(-6, 5))


@dataclass(frozen=True)
class Refit:
    """W'_K = argmin E||y - W'_K x_K - b||^2 + lambda ||W'_K - W_K||^2, K the features that stay.

    A ridge toward the old weights (with y = W x that is W'_K = (W H)_K (H_KK)^-1, H damped alike
    in both places: optimal brain surgeon, ZipLM, OSSCAR). lambda is `damping` times the mean
    diagonal of E[x x'] over K; if that is None, each layer takes the one of `GRID` with the least
    generalised cross-validation error (Golub, Heath and Wahba, 1979), a share `independent` of
    the samples taken to be independent, and keeps its weights where no refit has less than they
    have: few samples then lead to little or no change. b is free where the operator has a bias
    and `bias` is set; then covariances stand in for second moments. With `sequential`, a second
    step follows: x is what the pruned and repaired network gives, y what the dense one gives, and
    the ridge (`leash` times the mean diagonal: what is seen is one kind of data, so that more
    than noise has to be feared) leads back to the weights of the first. With `residual` y also
    makes good what is wrong in the sum that the product is added into; with `every`, layers that
    lose nothing are fit to what they read now, too, and, before one that must stay as it is (a
    head that is tied to an embedding), the gain of the norm, by itself. `batch_norm` takes the
    statistics of batch norms anew afterwards.
    """

    name: ClassVar[str] = "refit"
    bias: bool = True
    damping: float | None = None
    independent: float = 1 / 3
    sequential: bool = False
    leash: float = 0.2
    residual: bool = False
    every: bool = False
    create_biases: bool = False
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.damping is not None and self.damping < 0:
            raise TypeError("damping must not be negative")
        if self.every and not self.sequential:
            raise TypeError("every asks for sequential: else such layers read what they did")
        if self.leash < 0:
            raise TypeError("leash must not be negative")
        if not 0 < self.independent <= 1:
            raise TypeError("independent is a share, above 0 and at most 1")

    def draft(self) -> Refit:
        """Return what stands in for this pass while plans are tried out: no ridge is sought."""
        return replace(self, damping=0.2) if self.damping is None else self

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W (outputs, features), columns out of `kept` as they were, and b (outputs,)."""
        bias = self.bias and has_bias
        k = torch.nonzero(kept).squeeze(1)
        made = weight.clone()
        if len(k):
            made[:, k] += self._change(weight, evidence, k, bias)
        return made, mean_shift(made, evidence, k) if bias else torch.zeros_like(evidence.y)

    def again(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for the second step of a sequential repair."""
        return replace(self, damping=self.leash).solve(weight, evidence, kept, has_bias=has_bias)

    def _change(self, weight: torch.Tensor, evidence: Evidence, k: torch.Tensor,
                bias: bool) -> torch.Tensor:
        """Return D = W'_K - W_K: D (H_KK + lambda) = E[r x_K'], r = y - W_K x_K what is missed."""
        if len(k) > SMALL and (self.damping is not None or (
                evidence.own is not None and torch.equal(evidence.own, weight))):
            return self._factored(weight, evidence, k, bias)  # else eigenvectors cost little
        weight = weight[:, k]
        gram, cross = evidence.moments(bias)
        gram, cross = gram[k][:, k], cross[k]
        missed = cross - gram @ weight.T
        scale = gram.diagonal().mean().clamp(min=1e-30)
        if self.damping is not None:
            eye = torch.eye(len(k), dtype=gram.dtype)
            return torch.linalg.solve(gram + max(self.damping, 1e-12) * scale * eye, missed).T
        values, vectors = torch.linalg.eigh(gram)
        values, turned = values.clamp(min=0), vectors.T @ missed
        power = evidence.power(bias) - float(((cross + missed) * weight.T).sum())
        ridge = _ridge(values, turned.square().sum(1), power,
                       self.independent * evidence.count - bias, scale * torch.tensor(GRID))
        return (vectors @ (turned / (values + ridge).unsqueeze(1))).T

    def _factored(self, weight: torch.Tensor, evidence: Evidence, k: torch.Tensor,
                  bias: bool) -> torch.Tensor:
        """The same by Cholesky factors, which sites that read the same features share."""
        stays = torch.zeros(len(evidence.x), dtype=torch.bool).index_fill_(0, k, True)
        gone = torch.nonzero(~stays).squeeze(1)
        key = k.numpy().tobytes(), bias
        if key not in evidence.shared:
            evidence.shared.clear()
            gram, between, among, scale = evidence.parts(k, gone, bias)
            evidence.shared[key] = Factors(gram), between, among, scale
        factors, between, among, scale = evidence.shared[key]
        ridge = max(self.damping or 0.0, 1e-12)
        if evidence.own is None or not torch.equal(evidence.own, weight):
            gram, cross = evidence.moments(bias)
            missed = Missed((cross[k] - gram[k][:, k] @ weight[:, k].T).div_(scale))
        else:
            missed = _of_gone(evidence.own[:, gone].T, between)
        if self.damping is None:
            at = best(factors, missed, partial(_power, weight[:, gone].T, among),
                      self.independent * evidence.count - bias, GRID, evidence.told.ridge)
            evidence.told.ridge = at
            if at is None:
                return torch.zeros_like(weight[:, k])
            ridge = GRID[at]
        found, evidence.told.error = solution(factors, ridge, missed, single=evidence.single)
        return found.T


def _of_gone(columns: torch.Tensor, between: torch.Tensor) -> Missed:
    """E[x_K r'] where y = W x, so that r = W_G x_G: E[x_K x_G'] W_G', `columns` being W_G'."""
    few = columns.shape[0] < columns.shape[1]
    return Missed(between, columns) if few else Missed(between @ columns)


def _power(columns: torch.Tensor, among: torch.Tensor, mixture: torch.Tensor) -> float:
    """E|mixture' r|^2 where r = W_G x_G."""
    mixed = columns @ mixture
    return float((mixed * (among @ mixed)).sum())


def _ridge(values: torch.Tensor, along: torch.Tensor, power: float, count: float,
           grid: torch.Tensor) -> float:
    """Return the ridge with the least error / (1 - degrees of freedom / count)^2, or infinity.

    `values` are eigenvalues of E[x x'], `along` the squares of E[r x'] along each, `power` is
    E[r'r], what is missed without a change (which infinity stands for).
    """
    best, least = float("inf"), power
    for ridge in grid.tolist():
        error = power - float((along * (values + 2 * ridge) / (values + ridge).square()).sum())
        left = 1 - float((values / (values + ridge)).sum()) / count if count > 0 else 0.0
        if left > 0 and max(error, 0.0) / left**2 < least:
            best, least = ridge, max(error, 0.0) / left**2
    return best


@dataclass(frozen=True)
class Bias:
    """b = E[y] - W_K E[x_K]: the bias alone makes good the mean of what goes (FLAP, AAAI 2024)."""

    name: ClassVar[str] = "bias"
    sequential: bool = False
    residual: bool = False
    create_biases: bool = True

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W as it is, and b (outputs,)."""
        k = torch.nonzero(kept).squeeze(1)
        return weight, mean_shift(weight, evidence, k)


def mean_shift(weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor) -> torch.Tensor:
    """Return E[y] - W_K E[x_K]."""
    return (evidence.y - weight[:, kept] @ evidence.x[kept]) / evidence.count


@dataclass(frozen=True)
class BatchNorm:
    """Mean and variance of every batch norm, taken anew in the pruned network, front to back.

    No weight changes (EagleEye, ECCV 2020; REPAIR, ICLR 2023).
    """

    name: ClassVar[str] = "batch-norm"
    weights: ClassVar[bool] = False
    batch_norm: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    residual: ClassVar[bool] = False
    create_biases: ClassVar[bool] = False

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W as it is, and no bias."""
        return weight, torch.zeros_like(evidence.y)
