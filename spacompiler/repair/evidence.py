"""What a repair knows of one site: the dense layer's inputs and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from ..evidence.consumers import Consumer
from ..evidence.statistics import Covariance
from ..evidence.where import exact
from .ridge import Factors


class Compensation(Protocol):
    """Repair the weights that stay, given what goes (before anything is sliced).

    `sequential` asks for evidence from the pruned and repaired network instead of the dense one,
    `residual` for an output that makes good the sum it is added into, `create_biases` for a bias
    in every linear layer and convolution that loses inputs. A pass may have two methods more:
    `again`, like `solve`, for the second step of a sequential repair, and `draft()`, a quicker
    pass that stands in for it while allocations are tried out.
    """

    name: ClassVar[str]
    sequential: bool
    residual: bool
    create_biases: bool

    def solve(self, weight: torch.Tensor, evidence: Evidence, kept: torch.Tensor, *,
              has_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return new weights (outputs, features) and what to add to the bias (outputs,).

        `kept` (features,) marks the features that stay.
        """


@dataclass
class Evidence:
    """Sums over `count` samples of one shared index: x (f,), y (o,), x x' (f, f), x y' (f, o), y'y.

    x is what the consumer reads, y what its product should be. Where y is `own` x, the product of
    the dense network itself with `own` (o, f), the last two are computed once they are asked for.
    `shared` is what those that read the same x have in common, `single` allows float32.
    """

    count: int
    x: torch.Tensor
    y: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    squares: float
    own: torch.Tensor | None = None
    shared: Shared = field(default_factory=dict)
    single: bool = False
    told: Told = field(default_factory=lambda: Told())

    def moments(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E[x x'] and E[x y'], of the deviations from the means if `centred`."""
        gram, cross = self.gram / self.count, self.cross / self.count
        if centred:
            x, y = self.x / self.count, self.y / self.count
            gram, cross = gram - torch.outer(x, x), cross - torch.outer(x, y)
        return gram, cross

    def parts(self, k: torch.Tensor, gone: torch.Tensor, centred: bool) -> tuple[
            torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """Return E[x_K x_K'], E[x_K x_G'], E[x_G x_G'] over the mean of the first's diagonal, and
        that mean; of deviations from the means if `centred`."""
        x = self.x / self.count
        diagonal = self.gram.diagonal()[k] / self.count
        scale = float((diagonal - x[k].square() if centred else diagonal).mean().clamp(min=1e-30))
        rows, others = self.gram.index_select(0, k), self.gram.index_select(0, gone)
        made = rows.index_select(1, k), rows.index_select(1, gone), others.index_select(1, gone)
        for part, one, other in zip(made, (k, k, gone), (k, gone, gone), strict=True):
            part.mul_(1 / (self.count * scale))
            if centred:
                part.addr_(x[one], x[other], alpha=-1 / scale)
        return *made, scale

    def power(self, centred: bool) -> float:
        """Return E[y'y], of the deviation from the mean if `centred`."""
        mean = float((self.y / self.count).square().sum()) if centred else 0.0
        return self.squares / self.count - mean

    def __getattr__(self, name: str) -> Any:
        """What follows from W, where it was left out: it costs more than a factorisation."""
        if name not in ("cross", "squares") or self.own is None:
            raise AttributeError(name)
        if name == "cross":
            self.cross = self.gram @ self.own.T
        else:
            self.squares = float((self.own.T * self.cross).sum())
        return self.__dict__[name]


Shared = dict[tuple[bytes, bool], tuple[Factors, torch.Tensor, torch.Tensor, float]]


@dataclass
class Told:
    """What a solution says besides: the ridge of the site before it, then its own, by its number
    in a grid, and how far off float32 was, relative to the change (nan: it was not used)."""

    ridge: int | None = None
    error: float = float("nan")


def of_dense(covariance: Covariance, weight: torch.Tensor, shared: int) -> Evidence:
    """Return the sums of one shared index in the dense network: y = W x, W (outputs, features)."""
    x, gram, w = covariance.total[shared], covariance.gram[shared], weight.double()
    seen = max(int(covariance.seen[shared]), 1)
    made = Evidence(seen, x, w @ x, gram, gram, 0.0, own=w)
    del made.cross, made.squares
    return made


def of_pair(at: Consumer, weight: torch.Tensor, dense: list[torch.Tensor],
            pruned: list[torch.Tensor], gap: list[torch.Tensor] | None) -> list[Evidence]:
    """Sum over batches: x as the pruned network has it, y = W x of the dense one (+ the gap).

    `dense` and `pruned` are what the consumer reads in each batch; one sum for each shared index.
    """
    total: list[Evidence] = []
    for i, (a, b) in enumerate(zip(dense, pruned, strict=True)):
        wanted = at.inputs(a) @ weight.mT.to(a)
        if gap is not None:
            wanted = wanted + gap[i]
        x = at.inputs(b)
        sums = (x.sum(1), wanted.sum(1), x.mT @ x, x.mT @ wanted)
        for s in range(len(x)):
            parts = [part[s].cpu().double() for part in sums]
            squares = float(exact(wanted[s]).square().sum())
            if i == 0:
                total.append(Evidence(x.shape[1], parts[0], parts[1], parts[2], parts[3], squares))
                continue
            have = total[s]
            have.count += x.shape[1]
            have.squares += squares
            for name, part in zip(("x", "y", "gram", "cross"), parts, strict=True):
                getattr(have, name).add_(part)
    return total
