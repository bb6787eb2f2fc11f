"""The best of several ridges, and the regression with it, by Cholesky in place of eigenvectors.

An eigendecomposition of G (n, n) serves every ridge at once, at the price of about twenty
factorisations of G + ridge. Few are needed: the error that is least at the right ridge rises on
both sides of it, and layers that follow each other mostly agree. So the search begins at the ridge
of a layer shortly before and goes down to the next valley. It looks at `PROBES` random mixtures of
the outputs and takes the trace of the inverse from as many random signs (Girard, 1989; Hutchinson,
1990), in float32; the regression itself is then solved for every output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..stages.tolerances import SOLVED

SMALL = 256
"""Up to so many features eigenvectors cost nothing."""
BLOCK, PROBES = 512, 128
FACTORS = 4
"""Factors that are held at once: the best ridge is among the last that were looked at."""


@dataclass
class Factors:
    """Cholesky factors of G + ridge, made once: G (n, n) float64, its mean diagonal one."""

    gram: torch.Tensor
    _made: dict[tuple[float, torch.dtype], torch.Tensor | None] = field(default_factory=dict)
    _short: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def of(self, ridge: float, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the lower factor (n, n) in a type, or None where there is none."""
        if (ridge, dtype) not in self._made:
            if dtype == torch.float32 and not self._short.ndim:
                self._short = self.gram.float()
            damped = (self._short if dtype == torch.float32 else self.gram).clone()
            damped.diagonal().add_(ridge)
            if len(self._made) == FACTORS:
                del self._made[next(iter(self._made))]
            self._made[ridge, dtype] = cholesky(damped)
        return self._made[ridge, dtype]

    def solve(self, ridge: float, of: torch.Tensor) -> torch.Tensor:
        """Return (G + ridge)^-1 of something, (n, m), in its own type."""
        factor = self.of(ridge, of.dtype)
        if factor is not None:
            return torch.cholesky_solve(of, factor)
        damped = self.gram.double()
        return torch.linalg.solve(damped + ridge * torch.eye(len(damped), dtype=damped.dtype),
                                  of.double()).to(of.dtype)


def cholesky(a: torch.Tensor) -> torch.Tensor | None:
    """Return the lower factor of a positive definite array (n, n), else None; `a` is overwritten.

    By blocks: products of matrices run at several times the speed of the library's factorisation.
    """
    for at in range(0, len(a), BLOCK):
        end = min(at + BLOCK, len(a))
        factor, failed = torch.linalg.cholesky_ex(a[at:end, at:end])
        if failed:
            return None
        a[at:end, at:end] = factor
        below = torch.linalg.solve_triangular(factor.mT, a[end:, at:end], upper=True, left=False)
        a[end:, at:end] = below
        a[at:end, end:] = 0
        for column in range(end, len(a), BLOCK):
            part = below[column - end:]
            a[column:, column:column + BLOCK].addmm_(part, part[:BLOCK].T, alpha=-1)
    return a


@dataclass(frozen=True)
class Missed:
    """M = left right (n, outputs): what weights miss along the features that stay.

    `right` is None for the unit matrix. Both are float64.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    def of(self, columns: torch.Tensor) -> torch.Tensor:
        """Return M times columns (outputs, m)."""
        return self.left @ (columns if self.right is None else self.right @ columns)


def solution(factors: Factors, ridge: float, missed: Missed, *,
             single: bool) -> tuple[torch.Tensor, float]:
    """Return X = (G + ridge)^-1 M (n, outputs) in float64, and how far off float32 was (or nan).

    The error is that of eight mixtures of X, found by a step of refinement in float64.
    """
    if single and (factor := factors.of(ridge, torch.float32)) is not None:
        found = torch.cholesky_solve(missed.left.float(), factor)
        found = (found if missed.right is None else found @ missed.right.float()).double()
        mixed = _signs(found.shape[1], 8)
        x = found @ mixed
        left = missed.of(mixed) - factors.gram @ x - ridge * x
        off = torch.cholesky_solve(left.float(), factor).double()
        error = float((off.norm(dim=0) / x.norm(dim=0).clamp(min=1e-300)).max())
        if error <= SOLVED.value:
            return found, error
    solved = factors.solve(ridge, missed.left)
    return solved if missed.right is None else solved @ missed.right, float("nan")


def best(factors: Factors, missed: Missed, power: Callable[[torch.Tensor], float], count: float,
         grid: tuple[float, ...], start: int | None) -> int | None:
    """Return which ridge of a grid has the least generalised cross-validation error.

    None where no change has less than that. `power(mixture)` is what mixtures (outputs, m) of the
    outputs miss without a change, `count` how many samples are independent; the search begins at
    `start`.
    """
    outputs = (missed.left if missed.right is None else missed.right).shape[1]
    mixture = torch.eye(outputs, dtype=torch.float64) if outputs <= PROBES else \
        _signs(outputs, PROBES)
    sought, whole = missed.of(mixture), power(mixture)
    both = torch.cat([sought, _signs(len(sought), PROBES)], 1)
    known: dict[int, float] = {}

    def error(at: int) -> float:
        if at not in known:
            known[at] = _error(factors, grid[at], both, whole, count)
        return known[at]

    at = _valley(error, len(grid), len(grid) // 2 if start is None else start)
    if error(at) >= whole:  # perhaps another valley is deeper
        at = min(range(len(grid)), key=lambda i: (error(i), i))
    return at if error(at) < whole else None


def _error(factors: Factors, ridge: float, both: torch.Tensor, power: float,
           count: float) -> float:
    """Error / (1 - degrees of freedom / count)^2; `both` are what is sought and random signs."""
    dtype = torch.float32
    factor = factors.of(ridge, dtype)
    if factor is None:
        dtype = torch.float64
        factor = factors.of(ridge, dtype)
    if factor is None or count <= 0:
        return float("inf")
    half = torch.linalg.solve_triangular(factor, both.to(dtype), upper=False)
    mine, trace = half.split([half.shape[1] - PROBES, PROBES], 1)
    full = torch.linalg.solve_triangular(factor.mT, mine, upper=True)
    gain = float(_squares(mine) + ridge * _squares(full))
    left = 1 - (len(factor) - ridge * float(_squares(trace)) / PROBES) / count
    return max(power - gain, 0.0) / left**2 if left > 0 else float("inf")


def _valley(error: Callable[[int], float], size: int, start: int) -> int:
    """Go down from a start to where the error rises on both sides; of equal ones to the last."""
    at = start
    while True:
        near = [i for i in (at - 1, at, at + 1) if 0 <= i < size]
        lower = min(near, key=lambda i: (error(i), -i))
        if lower == at:
            return at
        at = lower


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dtype=torch.float64)


def _signs(rows: int, columns: int) -> torch.Tensor:
    """Random signs (rows, columns), the same every time."""
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (rows, columns), generator=draws).double() * 2 - 1
