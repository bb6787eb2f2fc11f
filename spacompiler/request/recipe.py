"""A recipe: everything a user may ask of a compile, as plain data that is saved beside the result.

>>> parse_target("params=70%")
('params', 0.7)
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from ..errors import UsageError, did_you_mean
from .registry import parse

METRICS = ("params", "body", "macs")
ROLES = ("channel", "head", "head dim", "hidden", "expert")
LAYOUTS = ("auto", "uniform", "any")


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

SEEDS = 1 << 32


@dataclass(frozen=True)
class Recipe:
    """Options of one compile.

    `target` is `metric=share%` of what stays, or `metric~share%` for the nearest that can be
    reached; `roles`, `only`, `ignore` say what may go, and `modules` which sub-modules to compile
    in place of the whole; `blocks` is how many whole blocks
    go (a number, `auto`, or their paths with commas between); `align` is a multiple for widths
    (None: what the CPU wants); `floor` the least share of each group. `importance` auto is
    `taylor`; for an ONNX file, which has no gradients, `wanda` with calibration data, else
    `magnitude`. `repair` auto is `refit`
    where scoring reads real calibration data anyway, else none; with `continued` it is fit to what
    the model itself writes on from each calibration window, too, and so are scores by covariance
    and curvature; `adapters` are directories, `DIR` or `DIR=weight`; `unused` are patterns over
    arrays of a checkpoint that its network has no use for.
    """

    target: str
    importance: str = "auto"
    allocation: str = "uniform"
    schedule: str = ""
    repair: str = "auto"
    roles: tuple[str, ...] = ("channel", "head")
    only: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    blocks: str = ""
    approximate: bool = False
    align: int | None = None
    floor: float = 0.1
    layout: str = "auto"
    calibration: str = ""
    continued: bool = False
    samples: int = 16
    length: int = 128
    batch: int = 2
    seed: int = 0
    prove: bool = True
    onnx: bool = True
    decoder: bool = False
    int8: bool = False
    int8_bits: int = 7
    latency: bool = True
    adapters: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    combine: str = "cat"
    keep_adapter: bool = False
    recovery: str = ""
    recover_data: str = ""
    recover_samples: int = 512
    recover_batch: int = 4

    def __post_init__(self) -> None:
        parse_target(self.target)
        for entry in fields(self):
            object.__setattr__(self, entry.name, _typed(entry, getattr(self, entry.name)))
        for role in self.roles:
            if role not in ROLES:
                raise UsageError(f"unknown role {role!r}", fix=did_you_mean(role, ROLES))
        if self.layout not in LAYOUTS:
            raise UsageError(f"unknown layout {self.layout!r}",
                             fix=did_you_mean(self.layout, LAYOUTS))
        if self.align is not None and self.align < 1:
            raise UsageError(f"align must be at least 1, not {self.align}")
        if not 0 <= self.floor < 1:
            raise UsageError(f"floor must be a share from 0 to below 1, not {self.floor}")
        for name in ("samples", "batch", "recover_samples", "recover_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1")
        check_combination(self.combine, len(self.adapters), self.keep_adapter)
        if self.keep_adapter and not self.adapters:
            raise UsageError("there is no adapter to keep", fix="give --adapter DIR")
        for name in ("decoder", "int8"):
            if getattr(self, name) and not self.onnx:
                raise UsageError(f"--{name} is about model.onnx, which --no-onnx leaves out")
        if self.int8_bits not in (7, 8):
            raise UsageError(f"int8 weights have 7 or 8 bits, not {self.int8_bits}",
                             fix="7 is right on every processor, 8 on those with VNNI alone")
        if self.blocks:
            parse_blocks(self.blocks)
            for option in ("modules", "keep_adapter"):
                if getattr(self, option):
                    raise UsageError(f"blocks cannot be dropped with {option}",
                                     fix="drop blocks first, and compile the result again")
        if not isinstance(self.seed, int) or not 0 <= self.seed < SEEDS:
            raise UsageError(f"seed must be a whole number from 0 to {SEEDS - 1}, "
                             f"not {self.seed}")
        if self.length < 2:
            raise UsageError("length must be at least 2 tokens")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


OPTION_RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "density": (lambda v: _number(v) and 0 < v < 1, "a share between 0 and 1: what stays"),
    "q": (lambda v: v == "auto" or (_number(v) and v >= 0), "a number above 0, or 'auto'"),
    "rank": (lambda v: isinstance(v, int) and v >= 0, "a whole number from 1"),
    "ridge": (lambda v: _number(v) and v > 0, "a number above 0"),
    "sign": (lambda v: v in ("total", "frequency"), "'total' or 'frequency'"),
    "output": (lambda v: isinstance(v, bool), "True or False"),
}


def _number(value: Any) -> bool:
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


def check_names(given: Iterable[str], beside: Iterable[str]) -> None:
    """Raise UsageError for a keyword that is no option; `beside` are those that no recipe holds."""
    known = {*beside, *(option.name for option in fields(Recipe))} - {"self", "options", "adapters"}
    for name in given:
        if name not in known:
            raise UsageError(f"there is no option {name!r}", fix=did_you_mean(name, known))


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "int | None": (int, type(None)), "float": (float, int),
    "bool": (bool,), "tuple[str, ...]": (tuple,)}
_WORDS = {"str": "text", "int": "a whole number", "int | None": "a whole number or None",
          "float": "a number", "bool": "True or False", "tuple[str, ...]": "a list of texts"}


def _typed(option: Field[Any], value: Any) -> Any:
    """Return an option of its own type: one text alone is a list of one, an index an int.

    Raises UsageError for any other type.
    """
    kind = str(option.type)
    if kind not in _TYPES:
        return value
    if kind == "tuple[str, ...]" and isinstance(value, (str, list, tuple)):
        value = (value,) if isinstance(value, str) else tuple(value)
    if kind.startswith("int") and hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)
    fits = isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))
    if not fits or (isinstance(value, tuple) and not all(isinstance(v, str) for v in value)):
        raise UsageError(f"{option.name} must be {_WORDS[kind]}, not {value!r}")
    return value


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


def parse_blocks(text: str) -> int | tuple[str, ...] | None:
    """Return how many blocks go, or which; None for `auto`. Raises UsageError for nonsense.

    >>> parse_blocks("4"), parse_blocks("auto"), parse_blocks("h.3, h.4")
    (4, None, ('h.3', 'h.4'))
    """
    if text == "auto":
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise UsageError(f"cannot drop {text} blocks", fix="give a number from 1, or auto")
        return int(text)
    paths = tuple(part.strip() for part in text.split(","))
    if not all(paths) or len(set(paths)) < len(paths):
        raise UsageError(f"cannot read blocks {text!r}",
                         fix="give a number, auto, or paths with commas between")
    return paths


def is_nearest(target: str) -> bool:
    """Whether the nearest share that can be reached will do (`params~70%`)."""
    return "~" in target


def parse_target(text: str) -> tuple[str, float]:
    """Return (metric, share that stays); raises UsageError for anything but 0% < share < 100%."""
    form = "write metric=share, e.g. params=70%, body=75% or macs=60%: the share that stays " \
           "(params~70%: the nearest to it that can be reached)"
    if not isinstance(text, str):
        raise UsageError(f"a target is text, not {text!r}", fix=form)
    found = re.fullmatch(r"\s*(\w+)\s*[=~]\s*([-+]?[\d.]+)\s*(%?)\s*", text)
    if not found:
        raise UsageError(f"cannot read target {text!r}", fix=form)
    metric, number, percent = found.groups()
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r} in target {text!r}",
                         fix=did_you_mean(metric, METRICS))
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError as problem:
        raise UsageError(f"cannot read target {text!r}", fix=form) from problem
    if not 0 < share < 1:
        raise UsageError(f"target {text!r} is out of range",
                         why="the share that stays must lie between 0% and 100%", fix=form)
    return metric, share
