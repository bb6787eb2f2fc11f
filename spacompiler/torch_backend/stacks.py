"""Lists of layers that a transformers model builds from one configuration, and each one's call.

No model is named here: the class is built once more on the meta device while the classes of its
layers are watched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .kinds import Config, StockModel
from .own_layers import LOCK, STOCK, Lists

KEY = "per_layer_config"
"""The entry that transformers merges for each layer."""


@dataclass(frozen=True)
class Layer:
    """How a layer was built: its class, its configuration, and what else it was given."""

    kind: Any
    config: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    turn: int

    def shapes(self, config: object) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its arrays, by name, were it built from another configuration."""
        with torch.device("meta"):
            made = self.kind(config, *self.args, **self.kwargs)
        return {name: tuple(t.shape) for name, t in made.state_dict().items()}


@dataclass(frozen=True)
class Stack:
    """A list of layers: its path, where its configuration lies, the entry for its own sizes."""

    path: str
    at: tuple[str, ...]
    key: str
    layers: tuple[Layer, ...]


def stacks(module: StockModel) -> list[Stack]:
    """Return the lists of layers that can be built from configurations of their own.

    Raises whatever the class raises when it is built.
    """
    lists = {path: list(entries) for path, entries in _lists(module)}
    kinds = {type(entry) for entries in lists.values() for entry in entries}
    config = copy.deepcopy(module.config)
    built, calls = _watched(type(module), config, kinds)
    found: list[Stack] = []
    for path in lists:
        layers = [calls.get(id(entry)) for entry in built.get_submodule(path).children()]
        at = _place(config, layers[0].config) if all(layers) else None  # type: ignore[union-attr]
        if at is not None and layers:
            found.append(Stack(path, at, "", tuple(layers)))  # type: ignore[arg-type]
    found.sort(key=lambda stack: stack.layers[0].turn)
    return list(_named(config, _buildable(found, calls.values())))


def as_lists(found: Sequence[Stack]) -> Lists:
    """Return which classes are to be watched while a model is built, and the entries in turn."""
    return tuple((tuple(dict.fromkeys(layer.kind for s in group for layer in s.layers)),
                  tuple(s.key for s in group)) for group in _groups(found))


def part(config: Config, at: Sequence[str]) -> Any:
    """Return the configuration inside another that lies at some names."""
    for name in at:
        config = getattr(config, name)
    return config


def plain(config: Config) -> Any:
    """Return a copy of a configuration that says nothing of single layers."""
    made: Any = copy.deepcopy(config)
    parts = [made]
    for one in parts:
        parts.extend(v for v in vars(one).values() if hasattr(v, "to_dict"))
        for key in [k for k in vars(one) if k == "_heterogeneity_spec" or k.startswith(KEY)]:
            del vars(one)[key]
    return made


def _lists(module: nn.Module) -> Iterator[tuple[str, Iterator[nn.Module]]]:
    """Lists of layers of transformers; of nested ones the outermost."""
    outer: list[str] = []
    for path, entries in module.named_modules():
        if isinstance(entries, nn.ModuleList) and len(entries) and \
                not any(path.startswith(f"{other}.") for other in outer) and \
                all(type(e).__module__.startswith(STOCK) and any(True for _ in e.children())
                    for e in entries):
            outer.append(path)
            yield path, entries.children()


def _watched(cls: Any, config: Config,
             kinds: Collection[type]) -> tuple[nn.Module, dict[int, Layer]]:
    """Build a class on the meta device; return it, and the calls that its layers were built by."""
    calls: dict[int, Layer] = {}

    def watching(kind: type, init: Callable[..., None]) -> Callable[..., None]:
        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            if type(self) is kind:
                rest = {k: v for k, v in kwargs.items() if k != "config"}
                given = (kwargs["config"], *args) if "config" in kwargs else args
                if given and hasattr(given[0], "to_dict"):
                    calls[id(self)] = Layer(kind, given[0], given[1:], rest, len(calls))
            init(self, *args, **kwargs)

        return build

    with LOCK, torch.device("meta"):
        plain = {kind: kind.__init__ for kind in kinds}  # type: ignore[misc]
        try:
            for kind, init in plain.items():
                kind.__init__ = watching(kind, init)  # type: ignore[misc]
            return cls(config), calls
        finally:
            for kind, init in plain.items():
                kind.__init__ = init  # type: ignore[misc]


def _place(config: Config, used: object) -> tuple[str, ...] | None:
    """Where the configuration that a layer was built from lies, or the one it is a copy of."""
    every = dict(_inside(config))
    same = [at for at, one in every.items() if one is used] or \
        [at for at, one in every.items() if type(one) is type(used)]
    return same[0] if len(same) == 1 else None


def _inside(config: Config, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield at, config
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _inside(value, (*at, name))


def _groups(found: Sequence[Stack]) -> list[list[Stack]]:
    """Lists of layers that share a class, in the order of their building."""
    groups: list[list[Stack]] = []
    for stack in found:
        kinds = {layer.kind for layer in stack.layers}
        near = [g for g in groups if kinds & {x.kind for s in g for x in s.layers}]
        groups = [g for g in groups if g not in near] + [[s for g in near for s in g] + [stack]]
    return groups


def _buildable(found: Sequence[Stack], calls: Collection[Layer]) -> list[Stack]:
    """Lists whose layers are told apart by the order in which they are built."""
    good = []
    for group in _groups(found):
        kinds = {layer.kind for stack in group for layer in stack.layers}
        turns = sorted(c.turn for c in calls if c.kind in kinds)
        of = [[layer.turn for layer in stack.layers] for stack in group]
        apart = all(a.layers[-1].config is not b.layers[0].config
                    for a, b in pairwise(group))
        if [turn for some in of for turn in some] == turns and apart:
            good += group
    return [stack for stack in found if stack in good]


def _named(config: Config, found: Sequence[Stack]) -> Iterator[Stack]:
    """Say under which entry each list's own sizes stand."""
    taken = set()
    for stack in found:
        first = stack.at not in taken and \
            getattr(part(config, stack.at), "num_hidden_layers", None) == len(stack.layers)
        taken |= {stack.at} if first else set()
        key = KEY if first else "_".join((KEY, "of", *stack.path.split(".")[:-1]))
        yield Stack(stack.path, stack.at, key, stack.layers)
