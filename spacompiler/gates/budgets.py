"""Budget rules: how gates are brought to a share of the dense cost. One row of a table each."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import ClassVar

import torch

from ..request.registry import row


class Budget:
    """A term of the objective, by the share of the cost that is open; none unless a rule adds one.

    `trades` says that what gates gain is set against what they cost at one price for all.
    """

    projects: ClassVar[bool] = False
    trades: bool = False

    def term(self, share: torch.Tensor, target: float, at: float) -> torch.Tensor:
        """Return what is added to the loss when a share `at` of the steps is done."""
        return torch.zeros(())

    def now(self, target: float, at: float) -> float:
        """Return the share of the cost that is wanted when a share `at` of the steps is done."""
        return target


class Projection(Budget):
    """Every step runs under a mask that meets the budget (see `projection`).

    Over a share `ramp` of the steps the budget comes down from all to the target: a little goes,
    a little is learned, and so on.
    """

    projects: ClassVar[bool] = True

    def __init__(self, trade: bool = True, ramp: float = 0.0) -> None:
        self.trades, self.ramp = trade, ramp

    def now(self, target: float, at: float) -> float:
        """Return the share of the cost that masks meet when a share `at` of the steps is done."""
        return _ramped(target, at, self.ramp)


class Sandwich(Projection):
    """Masks of all slices, of the target, and of shares drawn between them, in turn.

    The sandwich rule (Yu and Huang, ICCV 2019): weights that train beside serve all sizes.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(trade=False)
        self._draws, self._turn = Random(seed), -1

    def now(self, target: float, at: float) -> float:
        """Return the share of the cost that the next mask meets."""
        self._turn = (self._turn + 1) % 4
        return (1.0, target)[self._turn] if self._turn < 2 else self._draws.uniform(target, 1.0)


class Lagrangian(Budget):
    """l1 (c - t) + l2 (c - t)^2, multipliers by gradient ascent; t ramps over a share `ramp`.

    As in CoFi (ACL 2022), LLM-Shearing and Compresso.
    """

    def __init__(self, lr: float = 0.1, ramp: float = 0.5) -> None:
        self.lr, self.ramp = lr, ramp
        self.first = self.second = 0.0

    def now(self, target: float, at: float) -> float:
        """Return t."""
        return _ramped(target, at, self.ramp)

    def term(self, share: torch.Tensor, target: float, at: float) -> torch.Tensor:
        """Return the penalty, and raise the multipliers."""
        miss = share - self.now(target, at)
        self.first += self.lr * float(miss.detach())
        self.second += self.lr * float(miss.detach()) ** 2
        return self.first * miss + self.second * miss.square()


class Penalty(Budget):
    """strength max(0, c / t - 1), |c / t - 1| if `both`: nothing more below the budget."""

    def __init__(self, strength: float = 1.0, both: bool = False) -> None:
        self.strength, self.both = strength, both

    def term(self, share: torch.Tensor, target: float, at: float) -> torch.Tensor:
        """Return the penalty."""
        miss = share / target - 1
        return self.strength * (miss.abs() if self.both else miss.clamp(min=0))


def _ramped(target: float, at: float, ramp: float) -> float:
    return 1 + (target - 1) * (min(1.0, at / ramp) if ramp else 1.0)


BUDGETS: Mapping[str, type[Budget]] = {
    "projection": Projection, "sandwich": Sandwich, "lagrangian": Lagrangian, "penalty": Penalty}


def budget(text: str) -> Budget:
    """Return a new rule for `name(option=value)`. Raises UsageError for an unknown one."""
    return row(BUDGETS, text, "budget rule")
