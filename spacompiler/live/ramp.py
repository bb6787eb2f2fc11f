"""When to remove how much: the share of the removal that is due at each optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from spacompiler.errors import UsageError
from spacompiler.request import registry


class Ramp(Protocol):
    """A schedule: `share(step)` grows from 0 to 1, `due(step)` says when slices are removed."""

    @property
    def steps(self) -> int:
        """The number of optimiser steps of the whole run; 0 if it is not known yet."""

    def share(self, step: int) -> float:
        """Return the share of the final removal that is due at a step (1-based)."""

    def due(self, step: int) -> bool:
        """True if slices are to be removed at this step."""


@dataclass(frozen=True)
class _Gradual:
    """`steps` in all; nothing before `warmup`, all of it after `cooldown` (shares of `steps`)."""

    steps: int = 0
    every: int = 10
    warmup: float = 0.1
    cooldown: float = 0.1
    start: float = 0.0
    power: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.steps < 0 or self.every < 1:
            raise UsageError("a schedule needs steps >= 0 and every >= 1")
        if not 0 <= self.warmup + self.cooldown < 1 or min(self.warmup, self.cooldown) < 0:
            raise UsageError("warmup and cooldown are shares of the steps, together below 1")
        if not 0 <= self.start <= 1:
            raise UsageError("start is a share from 0 to 1")

    def share(self, step: int) -> float:
        """1 + (start - 1) * (1 - u)^power, u running from 0 to 1 between warm-up and cool-down."""
        first, last = self.warmup * self.steps, self.steps - self.cooldown * self.steps
        if step <= first:
            return self.start
        if step >= last:
            return 1.0
        left = 1 - (step - first) / (last - first)
        return 1 + (self.start - 1) * left**self.power

    def due(self, step: int) -> bool:
        """Every `every` steps between warm-up and cool-down, and when the cool-down begins."""
        share = self.share(step)
        if share >= 1:
            return self.share(step - 1) < 1
        return share > 0 and step % self.every == 0


@dataclass(frozen=True)
class Cubic(_Gradual):
    """Fast at first, slow at the end (Zhu & Gupta 2017; LoRAPrune's schedule)."""

    name: ClassVar[str] = "cubic"
    power: ClassVar[int] = 3


@dataclass(frozen=True)
class Linear(_Gradual):
    """The same number of slices at every event."""

    name: ClassVar[str] = "linear"


@dataclass(frozen=True)
class Once:
    """Everything at one step, watching until then."""

    name: ClassVar[str] = "once"
    at: int = 1

    @property
    def steps(self) -> int:
        """The step at which everything goes."""
        return self.at

    def share(self, step: int) -> float:
        """Return 0 before the step, 1 from it on."""
        return float(step >= self.at)

    def due(self, step: int) -> bool:
        """True at the step alone."""
        return step == self.at


def staying(size: int, final: int, share: float) -> int:
    """Return how many of `size` slices stay when a share of the removal down to `final` is due.

    >>> staying(10, 4, 0.5)
    7
    """
    return size - int((size - final) * share + 1e-9)


RAMPS: dict[str, Callable[..., Ramp]] = {r.name: r for r in (Cubic, Linear, Once)}


def find(what: object) -> Any:
    """Return a schedule for `cubic(steps=1000, every=10)`, or the object itself.

    >>> find("cubic(steps=100)").share(50)
    0.875

    Raises UsageError for an unknown name or an impossible option.
    """
    if not isinstance(what, str):
        return what
    return registry.row(RAMPS, what, "schedule")
