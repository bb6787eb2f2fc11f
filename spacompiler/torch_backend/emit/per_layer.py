"""The per-layer layout: a pruned Hugging Face model whose layers have configurations of their own.

No model is named here. For each layer the entries are found that give its pruned shapes, as
`stock` finds them for all layers at once; the layer alone is built, by the call that its model
class makes. What all layers agree on is said once, the rest under `per_layer_config`. Types that
read that entry themselves are built by their stock class, others by `own_layers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...axes.choices import Choices
from ...errors import SpaError
from ...groups.solution import Solution
from ..kinds import Config, StockModel
from ..own_layers import auto_map, own_class, stock_of
from ..stacks import Layer, Stack, as_lists, part, plain, stacks
from . import stock
from . import stock_search as search

Shapes = Mapping[str, tuple[int, ...]]
Entries = dict[Any, Any]
"""Names of entries of a configuration, and their values."""
Place = tuple[str, ...]
"""Names of the configurations inside a configuration, from the outermost on."""


@dataclass
class Search:
    """What is known of a model whose layers are to be described, while choices are tried."""

    module: StockModel
    tied: Mapping[str, str]
    solution: Solution
    found: Sequence[Stack] = ()
    known: dict[tuple[Any, ...], Entries | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense = {n: tuple(t.shape) for n, t in self.module.state_dict().items()}
        try:
            self.found = stacks(self.module) if stock_of(type(self.module)) else ()
        except Exception as problem:  # any class may be built here
            raise _cannot(self.module, f"{type(problem).__name__}: {problem}") from problem
        if not self.found:
            raise _cannot(self.module, "it has no list of layers that transformers builds from a "
                                       "configuration")

    def fit(self, choices: Choices) -> bool:
        """Whether each layer, and what lies beside them, has entries for its pruned shapes."""
        try:
            self.entries(choices)
        except SpaError:
            return False
        return True

    def entries(self, choices: Choices) -> tuple[dict[Place, Entries], dict[str, list[Entries]]]:
        """Return the entries that all layers share, by where they stand, and those of each layer
        by list.

        Raises SpaError where there are none.
        """
        shapes = stock.pruned_shapes(self.module, self.tied, self.solution, choices)
        outer = plain(self.module.config)
        common = {at: dict(search.pinned_head_dim(part(outer, at)))
                  for at in dict.fromkeys(((), *(stack.at for stack in self.found)))}
        common[()] |= self._outside(shapes, choices)
        return common, {
            stack.path: [self._own(stack, i, common[stack.at], shapes, choices)
                         for i in range(len(stack.layers))] for stack in self.found}

    def _outside(self, shapes: Shapes, choices: Choices) -> Entries:
        """Entries for arrays that lie in no layer."""
        outside = {n: s for n, s in shapes.items()
                   if not any(n.startswith(f"{stack.path}.") for stack in self.found)}
        if all(self.dense[n] == s for n, s in outside.items()):
            return {}
        config, cls = plain(self.module.config), stock_of(type(self.module))

        def wrong(changes: Mapping[Any, Any]) -> int:
            found = stock.misfits(cls, stock.changed(config, changes), outside)
            return sum(not line.endswith("would be added") for line in found)

        for changes in search.candidates(
                config, stock.changed_sizes(self.solution, choices, outside.keys()), wrong):
            if not wrong(changes):
                return search.least(changes, lambda some: not wrong(some))
        raise _cannot(self.module, "no entry gives the sizes outside of its layers")

    def _own(self, stack: Stack, i: int, common: Entries, shapes: Shapes,
             choices: Choices) -> Entries:
        """Entries of one layer, beside those that all share. Raises SpaError if there are none."""
        layer, prefix = stack.layers[i], f"{stack.path}.{i}."
        names = [n for n in shapes if n.startswith(prefix)]
        if all(shapes[n] == self.dense[n] for n in names):
            return {}
        wanted = {n.removeprefix(prefix): shapes[n] for n in names}
        said = _said(self.module.config, stack).get(i, {})
        key = (stack.path, layer.kind, repr(said), repr(common), tuple(wanted.items()))
        if key not in self.known:
            base = copy.copy(layer.config)
            vars(base).pop("_heterogeneity_spec", None)
            search.put(base, {**said, **common})
            self.known[key] = _entries(layer, base, wanted, stock.changed_sizes(
                self.solution, choices, {self.tied.get(n, n) for n in names}))
        found = self.known[key]
        if isinstance(found, str):
            raise _cannot(self.module, f"{stack.path}.{i}: {found}")
        return found


def _entries(layer: Layer, base: Config, wanted: Shapes,
             sizes: dict[int, set[int]]) -> Entries | str:
    """Return the entries that give one layer its shapes, or why there are none."""

    def wrong(changes: Mapping[Any, Any]) -> list[str]:
        config = stock.changed(base, changes)
        if config is None:
            return ["the config refuses such sizes"] * (len(wanted) + 1)
        try:
            have = layer.shapes(config)
        except Exception as problem:  # any class may be built here
            return [f"{type(problem).__name__}: {problem}".splitlines()[0]] * (len(wanted) + 1)
        return [f"{n} would be {have.get(n, 'missing')}, not {s}"
                for n, s in wanted.items() if have.get(n) != s] + \
               [f"{n} would be added" for n in have.keys() - wanted.keys()]

    if not (problem := wrong({})):
        return {}
    for changes in search.candidates(base, sizes, lambda some: len(wrong(some))):
        if not (problem := wrong(changes)):
            return search.spelt(base, search.least(changes, lambda some: not wrong(some)))
    return problem[0]


@dataclass(frozen=True)
class Described:
    """A configuration of a pruned model, the class that it is built by, and whether it says
    anything of single layers."""

    config: Any
    cls: Callable[..., StockModel]
    single: bool


def describe(looked: Search, choices: Choices) -> Described:
    """Return the configuration of a pruned model with its class.

    Raises SpaError where none has exactly its shapes.
    """
    module = looked.module
    common, own = looked.entries(choices)
    config: Any = plain(module.config)
    vars(config).pop("auto_map", None)
    search.put(config, stock.besides(module, looked.solution, choices))
    for at, entries in common.items():
        search.put(part(config, at), entries)
    tables = [(stack, _said(module.config, stack), own[stack.path]) for stack in looked.found]
    for at in dict.fromkeys(stack.at for stack in looked.found):
        _say(part(config, at), [t for t in tables if t[0].at == at])
    _readable(config, [part(config, stack.at) for stack in looked.found])
    shapes = stock.pruned_shapes(module, looked.tied, looked.solution, choices)
    base = stock_of(type(module))
    single = any(part(config, s.at).to_dict().get(s.key) for s in looked.found)
    if not stock.misfits(base, config, shapes):
        return Described(config, base, single)
    config.auto_map = auto_map(base)
    made = own_class(base, as_lists(looked.found))
    if problem := next(iter(stock.misfits(made, config, shapes)), ""):
        raise _cannot(module, problem)
    return Described(config, made, single)


def _say(config: Config, tables: Sequence[tuple[Stack, dict[int, Entries], list[Entries]]]) -> None:
    """Write the entries of single layers into their configuration: once, where all agree."""
    every = [({**said.get(i, {}), **entries}, stack, i)
             for stack, said, own in tables for i, entries in enumerate(own)]
    for name in dict.fromkeys(name for entries, _, _ in every for name in entries):
        now = getattr(config, name, None)
        values = [entries.get(name, now) for entries, _, _ in every]
        if all(value == values[0] for value in values):
            setattr(config, name, values[0])
            now = values[0]
        for entries, _, _ in every:
            if entries.get(name) == now:
                entries.pop(name, None)
    for stack in (stack for stack, _, _ in tables):
        layers = {str(i): entries for entries, of, i in every if of is stack and entries}
        if layers:
            setattr(config, stack.key, layers)


def _readable(config: Any, parts: Sequence[Any]) -> None:
    """Let a configuration that looks at what layers differ in read what all but those have."""
    try:
        type(config).from_dict(config.to_dict())
    except RuntimeError:  # it is about an entry that single layers have, too
        for one in parts:
            one.allow_global_per_layer_attribute_access = True


def _said(config: Config, stack: Stack) -> dict[int, Entries]:
    """What a configuration says of the single layers of a list."""
    said = part(config, stack.at).to_dict().get(stack.key) or {}
    return {int(i): dict(entries) for i, entries in said.items()}


def _cannot(module: nn.Module, why: str) -> SpaError:
    return SpaError("no configuration describes its layers one by one",
                    where=type(module).__name__, why=why,
                    fix="prune other roles, or use --layout uniform or any")
