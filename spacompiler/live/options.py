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

    `ema` is the memory of the moving averages, `prove` whether each shrunk model is checked.
    Raises UsageError for an ema outside of [0, 1).
    """

    ema: float = 0.9
    prove: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be from 0 to below 1, not {self.ema}")


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
