"""What calibration gathers of a consumer's input X, streaming: moments, covariance, fluctuation.

Every statistic is an accumulator with `add(x, examples, seen)`, x: (shared, samples, features);
sums are kept in float64. That is `take(*of(x, examples, seen))`: what a batch gives follows from it
alone, so that another process can work it out; taking it in is cheap. Where samples are dealt out
(to experts), `seen` (shared,) says how many each index has; every sample that another one has
counts as zeros, so that what goes from an expert matters as often as the expert is taken. A back
end feeds the X of each consumer, batch after batch; who runs the network (torch, ONNX Runtime) does
not matter here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from .consumers import Consumer
from .room import Room
from .where import able, exact

BLOCK, ROWS = 256, 64
"""Rows of X^T X that are multiplied at a time, and of these, that are added."""


class Accumulator(Protocol):
    """A statistic of X under way."""

    def add(self, x: torch.Tensor, examples: int, seen: torch.Tensor | None = None) -> None:
        """Take in one batch: x (shared, samples, features), samples example by example."""

    def of(self, x: torch.Tensor, examples: int,
           seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return what a batch gives, which depends on nothing that was taken in before."""

    def take(self, *parts: torch.Tensor) -> None:
        """Take in what `of` made of a batch."""


class _Added:
    """Takes in a batch as soon as it is worked out."""

    def add(self: Accumulator, x: torch.Tensor, examples: int,
            seen: torch.Tensor | None = None) -> None:
        """Add a batch. `x` is (shared, samples, features)."""
        self.take(*self.of(x, examples, seen))


def _samples(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    return torch.tensor(x.shape[1] if seen is None else int(seen.sum()))


@dataclass
class Moments(_Added):
    """Count of samples, and per feature the sum and the sum of squares: (shared, features)."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def of(self, x: torch.Tensor, examples: int,
           seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return how many samples a batch has, and its sums."""
        x = exact(x)
        return _samples(x, seen), x.sum(1).cpu(), x.square().sum(1).cpu()

    def take(self, *parts: torch.Tensor) -> None:
        """Add what `of` gives."""
        samples, total, squares = parts
        self.count += int(samples)
        self.total = self.total + total
        self.squares = self.squares + squares

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each feature: (shared, features)."""
        return self.total / self.count

    @property
    def norm(self) -> torch.Tensor:
        """||X_j||_2 over all samples."""
        return self.squares.sqrt()

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each feature: (shared, features)."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


@dataclass
class Covariance(_Added):
    """Count, sums (shared, features) and X^T X (shared, features, features).

    `seen` (shared,) is the count without the samples that are dealt out to other indices, `upper`
    X^T X as far as it was summed up: on and above a diagonal of blocks, for the rest says the same;
    `room` is where it lies.
    """

    count: int = 0
    seen: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    upper: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    room: Room = field(default_factory=Room)

    def __post_init__(self) -> None:
        self._whole = False

    def of(self, x: torch.Tensor, examples: int,
           seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return how many samples a batch has, in all and by index, its sums and X^T X.

        Of that, `BLOCK` rows at a time from the diagonal on.
        """
        x = x if x.dtype == torch.float64 else x.float()
        each = torch.full((len(x),), x.shape[1]) if seen is None else seen.cpu()
        return (_samples(x, seen), each, able(x).sum(1, dtype=torch.float64).cpu(), *(
            (x[..., at:at + BLOCK].mT @ x[..., at:]).cpu() for at in range(0, x.shape[-1], BLOCK)))

    def take(self, *parts: torch.Tensor) -> None:
        """Add what `of` gives."""
        samples, seen, total, *products = parts
        self.count += int(samples)
        self.seen = self.seen + seen
        self.total = self.total + total
        if self.upper.ndim == 0:
            self.upper = self.room.take(total.new_zeros(()).expand(*total.shape, total.shape[-1]))
        for at, product in zip(range(0, total.shape[-1], BLOCK), products, strict=True):
            for row, some in enumerate(product.split(ROWS, 1)):  # widened where it is still near
                self.upper[:, at + row * ROWS:, at:][:, :some.shape[1]].add_(some)
        self._whole = False

    @property
    def gram(self) -> torch.Tensor:
        """X^T X."""
        for at in range(BLOCK, 0 if self._whole else self.upper.shape[-1], BLOCK):
            self.upper[:, at:at + BLOCK, :at] = self.upper[:, :at, at:at + BLOCK].mT
        self._whole = True
        return self.upper

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each feature: (shared, features)."""
        return self.total / self.count

    @property
    def second(self) -> torch.Tensor:
        """H = X^T X / count: (shared, features, features)."""
        return self.gram / self.count

    @property
    def centred(self) -> torch.Tensor:
        """C = H - mean mean^T: what remains once a bias repairs the mean."""
        return torch.stack([self.moment(i, centred=True) for i in range(len(self.gram))])

    def moment(self, index: int, *, centred: bool) -> torch.Tensor:
        """C or H of one shared index, (features, features), in memory of its own."""
        h, mean = self.gram[index] / self.count, self.mean[index]
        return h.addr_(mean, mean, alpha=-1) if centred else h


@dataclass
class Fluctuation(_Added):
    """The running mean and fluctuation that FLAP's released code computes, example by example.

    With n examples seen: mean <- (n mean + mean_t x) / (n + 1), then
    fluctuation <- fluctuation (n - 1) / n + sum_t (x - mean)^2 / (n + 1); the first adds nothing.
    """

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    value: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def of(self, x: torch.Tensor, examples: int,
           seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return the samples of each example and X itself: the mean so far goes into all."""
        return _samples(x, seen) // examples, torch.tensor(examples), x.cpu()

    def take(self, *parts: torch.Tensor) -> None:
        """Go over the examples of a batch, one by one."""
        samples, examples, x = int(parts[0]), int(parts[1]), parts[2]
        for one in x.double().unflatten(1, (examples, -1)).unbind(1):
            n = self.count
            self.mean = (n * self.mean + one.sum(1) / samples) / (n + 1)
            zeros = (samples - one.shape[1]) * self.mean.square()
            spread = ((one - self.mean.unsqueeze(1)).square().sum(1) + zeros) / (n + 1)
            self.value = self.value * (n - 1) / n + spread if n else torch.zeros_like(spread)
            self.count += 1


@dataclass
class Zeros(_Added):
    """Count of samples, and how many of them are exactly zero: (shared, features)."""

    count: int = 0
    value: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def of(self, x: torch.Tensor, examples: int,
           seen: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Return how many samples a batch has, and how many are zero."""
        samples = _samples(x, seen)
        return samples, (x == 0).sum(1).double() + (samples - x.shape[1])

    def take(self, *parts: torch.Tensor) -> None:
        """Add what `of` gives."""
        self.count += int(parts[0])
        self.value = self.value + parts[1]


OF_INPUTS: dict[str, type[Any]] = {
    "moments": Moments, "covariance": Covariance, "fluctuation": Fluctuation, "zeros": Zeros}


def forward_only(needs: Iterable[str]) -> bool:
    """True if no statistic among `needs` takes a gradient: such criteria work on ONNX too."""
    return set(needs) <= OF_INPUTS.keys()


@dataclass(frozen=True)
class View:
    """A consumer as one group sees it.

    `weight` is W (shared, outputs, features), `curvature` (shared, outputs, outputs) what
    `Gradients` has of its result; `slot` (shared, features) the flat index into
    `shape` of the slice that a feature belongs to, -1 where it belongs to none.
    """

    consumer: Consumer
    weight: torch.Tensor
    slot: torch.Tensor
    shape: tuple[int, ...]
    found: dict[str, Any]
    array_gradient: Callable[[str], torch.Tensor]
    curvature: torch.Tensor | None = None

    def gradient(self, kind: str) -> torch.Tensor:
        """Return weight_gradients, weight_squares or weight_absolutes in the shape of W."""
        return self.consumer.matrix(self.array_gradient(kind))

    @property
    def moments(self) -> Moments:
        """The moments of X; there if the criterion needs them, as are those below."""
        return self.found["moments"]

    @property
    def covariance(self) -> Covariance:
        """The sums of X and X^T X."""
        return self.found["covariance"]

    @property
    def fluctuation(self) -> Fluctuation:
        """The running mean and fluctuation of X."""
        return self.found["fluctuation"]

    @property
    def zeros(self) -> Zeros:
        """How often each feature is zero."""
        return self.found["zeros"]

    def onto(self, values: torch.Tensor) -> torch.Tensor:
        """Sum one number per feature, (shared, features), onto the group: `shape`."""
        inside = self.slot >= 0
        total = torch.zeros(prod(self.shape), dtype=torch.float64)
        total.index_add_(0, self.slot[inside], values[inside].double())
        return total.reshape(self.shape)
