"""Bisection on a price: costs fall in steps, so both ends of what is left are looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .problem import Problem


def bisect(goes_up: Callable[[float], bool], low: float, high: float,
           steps: int) -> tuple[float, float]:
    """Halve (low, high) so many times; where `goes_up(middle)`, the upper half is left.

    >>> bisect(lambda x: x * x < 2, 0.0, 2.0, 4)
    (1.375, 1.5)
    """
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if goes_up(middle) else (low, middle)
    return low, high


def nearest(problem: Problem, at: Callable[[float], dict[str, int]], low: float, high: float,
            steps: int, *, rising: bool = True) -> dict[str, int]:
    """Return the counts `at(x)` whose cost is nearest to the target, x found by bisection.

    The cost rises with x, or (`rising` is False) falls.
    """
    def goes_up(x: float) -> bool:
        return (problem.price(at(x)) > problem.target) != rising

    ends = bisect(goes_up, low, high, steps)
    return min(map(at, ends), key=lambda k: abs(problem.price(k) - problem.target))
