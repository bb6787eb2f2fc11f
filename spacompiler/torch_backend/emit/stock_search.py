"""Which entries of a transformers config say the pruned sizes: candidates, the likeliest first.

Every integer of the config that equals a size that changed may have to change with it. Few are
tried in every combination; many are searched one at a time, by how many arrays still differ.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..kinds import Config

LIMIT = 256
"""Combinations that are tried one by one."""
LAYERS, LIST = "per_layer_config", "[]"

_SIZES = re.compile(r"(^|_)(inner|dim|size|width|heads)$")
"""What entries for sizes are called, where they have no value to tell them by."""

Key = str | tuple[str, str, int]
"""An entry's name; (per_layer_config, name, old value): all layers that have this value; or
([], name, place): one number of an entry that is a list."""


def candidates(config: Config, sizes: Mapping[int, set[int]],
               wrong: Callable[[dict[Key, Any]], int]) -> Iterator[dict[Key, Any]]:
    """Yield sets of changed entries, the largest first; `wrong` counts the arrays that differ.

    `sizes` are the new sizes by the old one.
    """
    options: list[list[Any]] = [[*((key, new) for new in sorted(sizes[value])), None]
                                for key, value in _entries(config) if value in sizes]
    options += [[*((key, new) for new in sorted(set().union(*sizes.values()))), None]
                for key in _blanks(config)] if sizes else []
    fixed = pinned_head_dim(config)
    count = 1
    for option in options:
        count *= len(option)
    if count <= LIMIT:
        for chosen in itertools.product(*options):
            yield {**fixed, **dict(c for c in chosen if c)}
    lists: list[list[Any]] = [[*((key, new) for new in sorted(sizes[value])), None]
                              for key, value in _numbers(config) if value in sizes]
    for more in [*([[]] if count > LIMIT else []), *([lists] if lists else [])]:
        every = [*options, *more]
        for start in ([option[0] for option in every], [None] * len(every)) if every else ():
            yield _descended(every, start, fixed, wrong)


def alike(config: Config, entries: Iterable[Key],
          sizes: Mapping[int, set[int]]) -> dict[Key, Any]:
    """Return the same entries with the new sizes of these; none if that is not plain."""
    old, fixed = dict(_entries(config)), pinned_head_dim(config)
    made: dict[Key, Any] = {}
    for key in entries:
        new = {fixed[key]} if key in fixed else sizes.get(old.get(key, 0), set())
        if len(new) != 1:
            return {}
        (made[key],) = new
    return made


def _descended(options: list[list[Any]], start: list[Any], fixed: dict[Key, Any],
               wrong: Callable[[dict[Key, Any]], int]) -> dict[Key, Any]:
    """Change one entry at a time while fewer arrays differ."""

    def changes(chosen: list[Any]) -> dict[Key, Any]:
        return {**fixed, **dict(c for c in chosen if c)}

    chosen, best, better = list(start), wrong(changes(start)), True
    while best and better:
        better = False
        for at, option in enumerate(options):
            for other in option:
                trial = [*chosen[:at], other, *chosen[at + 1:]]
                if other != chosen[at] and (count := wrong(changes(trial))) < best:
                    chosen, best, better = trial, count, True
    return changes(chosen)


def _entries(config: Config) -> Iterator[tuple[Key, int]]:
    """Yield the integers of a config, those of single layers once for all with one value."""
    data = config.to_dict()
    for key, value in data.items():
        if type(value) is int:
            yield key, value
    seen: set[Key] = set()
    for layer in (data.get(LAYERS) or {}).values():
        for key, value in layer.items():
            if type(value) is int and (LAYERS, key, value) not in seen:
                seen.add((LAYERS, key, value))
                yield (LAYERS, key, value), value


def _numbers(config: Config) -> Iterator[tuple[Key, int]]:
    """Yield the integers of a config's lists."""
    for name, value in config.to_dict().items():
        if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
            yield from (((LIST, name, i), v) for i, v in enumerate(value))


def _blanks(config: Config) -> list[str]:
    """Entries for sizes that are left to the class: None stands for what it computes."""
    return [key for key, value in config.to_dict().items()
            if value is None and key != "head_dim" and _SIZES.search(key)]


def put(config: Config, changes: Mapping[Key, Any]) -> None:
    """Change entries of a config in place; what single layers say is said anew."""
    layers = config.to_dict().get(LAYERS)
    for key, value in changes.items():
        if isinstance(key, str):
            setattr(config, key, value)
        elif key[0] == LIST:
            _, name, at = key
            numbers = list(getattr(config, name))
            setattr(config, name, [*numbers[:at], value, *numbers[at + 1:]])
    if not layers:
        return
    inside = {key[1:]: value for key, value in changes.items() if key[0] == LAYERS}
    setattr(config, LAYERS, {layer: {name: inside.get((name, value), value)
                                     for name, value in own.items()}
                             for layer, own in layers.items()})


def spelt(config: Config, changes: Mapping[Key, Any]) -> dict[Key, Any]:
    """Return changed entries by their names alone, lists as a whole."""
    made = copy.deepcopy(config)
    put(made, changes)
    return {name: getattr(made, name)
            for name in (key if isinstance(key, str) else key[1] for key in changes)}


def least(changes: dict[Key, Any], fit: Callable[[dict[Key, Any]], bool]) -> dict[Key, Any]:
    """Take back every change that the shapes do not need: it only happened to have that size."""
    for key in list(changes):
        fewer = {k: v for k, v in changes.items() if k != key}
        if key != "head_dim" and fit(fewer):
            changes = fewer
    return changes


def pinned_head_dim(config: Config) -> dict[Key, Any]:
    """Where heads x head_dim = hidden is implied, say head_dim before either changes."""
    data = config.to_dict()
    heads, hidden = data.get("num_attention_heads", 0), data.get("hidden_size", 0)
    if "head_dim" in data and data["head_dim"] is None and heads and hidden % heads == 0:
        return {"head_dim": hidden // heads}
    return {}
