"""Refit: least squares for the weights that stay, a bias for the mean, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spacompiler.repair import Evidence


@dataclass(frozen=True)
class Refit:
    """W'_K = argmin E||y - W'_K x_K - b||^2 + lambda ||W'_K - W_K||^2, K the features that stay.

    lambda is `damping` times the mean diagonal of E[x x']: a ridge toward the old weights (with
    y = W x that is W'_K = (W H)_K (H_KK)^-1, H damped alike in both places: optimal brain
    surgeon, ZipLM, OSSCAR). b is free where the operator has a bias and `bias` is set; then
    covariances stand in for second moments. With `sequential`, x is what the pruned and
    repaired network gives, y what the dense one gives, and with `residual` y also makes good
    what is wrong in the sum that the product is added into. `batch_norm` takes the statistics of
    batch norms anew afterwards.
    """

    name: ClassVar[str] = "refit"
    bias: bool = True
    damping: float = 0.01
    sequential: bool = False
    residual: bool = False
    create_biases: bool = False
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise TypeError("damping must not be negative")

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W (outputs, features), columns out of `kept` as they were, and b (outputs,)."""
        bias = self.bias and has_bias
        gram, cross = evidence.moments(bias)
        k = torch.nonzero(kept).squeeze(1)
        ridge = self.damping * gram.diagonal().mean()
        damped = gram[k][:, k] + ridge.clamp(min=1e-30) * torch.eye(len(k), dtype=gram.dtype)
        made = weight.clone()
        if len(k):
            made[:, k] = torch.linalg.solve(damped, cross[k] + ridge * weight[:, k].T).T
        return made, mean_shift(made, evidence, k) if bias else torch.zeros_like(evidence.y)


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
