"""Ways to make one adapter of several: what there is, its options, and what they may be.

>>> parse_combination("linear")
('linear', {})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError, did_you_mean
from .registry import parse


@dataclass(frozen=True)
class Combination:
    """A way to make one adapter of several: its options with their defaults.

    `alone` says, from the options given, whether it acts on one adapter too.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    alone: Callable[[Mapping[str, Any]], Any] = lambda options: False


def _always(options: Mapping[str, Any]) -> bool:
    return True


def _to_rank(options: Mapping[str, Any]) -> bool:
    return bool(options["rank"])


COMBINATIONS: Mapping[str, Combination] = {
    "cat": Combination(alone=_always),
    "linear": Combination(),
    "svd": Combination({"rank": 0}, _to_rank),
    "ties": Combination({"density": 0.5, "sign": "total"}, _always),
    "dare_linear": Combination({"density": 0.5}, _always),
    "dare_ties": Combination({"density": 0.5, "sign": "total"}, _always),
    "dare": Combination({"density": 0.5, "q": 0.0}, _always),
    "lego": Combination({"rank": 0, "output": False}, _to_rank),
    "fair": Combination({"ridge": 1e-2}),
}

OPTION_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "density": (lambda v: _number(v) and 0 < v < 1, "a share between 0 and 1: what stays"),
    "q": (lambda v: v == "auto" or (_number(v) and v >= 0), "a number above 0, or 'auto'"),
    "rank": (lambda v: isinstance(v, int) and v >= 0, "a whole number from 1"),
    "ridge": (lambda v: _number(v) and v > 0, "a number above 0"),
    "sign": (lambda v: v in ("total", "frequency"), "'total' or 'frequency'"),
    "output": (lambda v: isinstance(v, bool), "True or False"),
}


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_combination(text: str) -> tuple[str, dict[str, Any]]:
    """Return (name, options) of a combination; raises UsageError for what does not exist.

    >>> parse_combination("dare_ties(density=0.2)")
    ('dare_ties', {'density': 0.2, 'sign': 'total'})
    """
    name, given = parse(text)
    if name not in COMBINATIONS:
        raise UsageError(f"unknown combination {name!r}", fix=did_you_mean(name, COMBINATIONS))
    options = COMBINATIONS[name].options
    for key, value in given.items():
        if key not in options:
            raise UsageError(f"combination {name!r} has no option {key!r}",
                             fix=f"options: {', '.join(options) or 'none'}")
        fits, form = OPTION_RANGES[key]
        if not fits(value):
            raise UsageError(f"{key}={value!r} cannot be in combination {name!r}",
                             fix=f"{key} is {form}")
    return name, {**options, **given}


def check_combination(text: str, adapters: int, keep: bool) -> None:
    """Raise UsageError where a combination has nothing to act on, or its result would be kept."""
    name, options = parse_combination(text)
    if name == "cat":
        return
    if not adapters:
        raise UsageError(f"--combine {name} has nothing to combine",
                         why="no adapter is given, and a PeftModel is merged as it stands",
                         fix="give --adapter DIR, or leave --combine out")
    if adapters == 1 and not COMBINATIONS[name].alone(options):
        raise UsageError(f"--combine {name} needs several adapters", why="one was given",
                         fix="leave --combine out, or give --adapter twice")
    if keep:
        raise UsageError("a combined adapter cannot be kept", where=f"--combine {text}",
                         why="the adapter that is cut is the one that was given",
                         fix="leave out --combine, or --keep-adapter")
