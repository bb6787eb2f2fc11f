"""The keywords of `Pruner` that are options: of the recipe, and of how it works."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from spacompiler.errors import UsageError
from spacompiler.request.recipe import Recipe

OPTIONS = ("target", "roles", "only", "ignore", "approximate", "align", "floor", "seed", "layout")
"""Options of a recipe that say something of a model while it trains."""


@dataclass(frozen=True)
class Manner:
    """How a pruner works, beside what it is to do.

    `ema` is the memory of the moving averages, `prove` whether each shrunk model is checked,
    `soft` what the weights of slices that are next to go are multiplied by after each step.
    Raises UsageError for an ema outside of [0, 1), or a soft outside of (0, 1].
    """

    ema: float = 0.9
    prove: bool = True
    soft: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be from 0 to below 1, not {self.ema}")
        if not 0 < self.soft <= 1:
            raise UsageError(f"soft must be above 0, at most 1, not {self.soft}",
                             fix="soft=0.95 takes a twentieth at each step; 1 is no soft shrinking")


def split(options: Mapping[str, object]) -> tuple[Manner, dict[str, object]]:
    """Return how a pruner is to work, and the options that are left for its recipe."""
    own = {f.name for f in fields(Manner)}
    given: dict[str, Any] = {name: value for name, value in options.items() if name in own}
    return Manner(**given), {name: v for name, v in options.items() if name not in own}


def recipe(target: str, options: Mapping[str, object], beside: Collection[str]) -> Recipe:
    """Return the recipe of a target; `beside` are keywords that are no options of it.

    Raises UsageError for an unknown keyword or an impossible value.
    """
    return Recipe.of({"target": target, "align": 1, **options}, among=OPTIONS,
                     beside={*beside, *(f.name for f in fields(Manner))})
