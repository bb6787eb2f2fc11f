"""Blocks that a model repeats are run once, and their operators noted again for the others.

Blocks in one list that have the same classes, attributes and sizes of arrays do the same to inputs
of the same kind. What may differ are numbers that tell blocks apart (`layer_idx`): those are
watched, and where the first block's code reads one, all blocks run. Nothing is shared in programs
that write into values: there it matters what shares memory with what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import fx, nn

from .nodes import again
from .signature import PLAIN, Once, differing, modes, signature

PARTS = 4
"""Modules of fewer parts (themselves counted) are run: noting their operators is all the work."""


class Notes(Protocol):
    """The graph under way, as whoever makes it holds it."""

    @property
    def graph(self) -> fx.Graph:
        """The graph, to which nodes are added at its end."""

    @property
    def wrote(self) -> bool:
        """Whether a value was written into."""

    def kind(self, tensor: torch.Tensor) -> object:
        """Return what is known of a tensor, to compare; raises Unlike for one that none is."""

    def array(self, part: nn.Module, name: str) -> fx.Node | None:
        """Return the node of an array that a module holds."""

    def place_of(self, part: nn.Module) -> str:
        """Return where a module stands, as nodes say it."""

    def copied(self, node: fx.Node) -> bool:
        """Whether a node is to be noted again, and not one for all blocks; raises Unlike for what
        cannot be."""

    def node(self, tensor: torch.Tensor) -> fx.Node:
        """Return the node of a value."""

    def note(self, result: torch.Tensor, node: fx.Node) -> None:
        """Let a node stand for a value."""

    def another(self, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same kind, of which nothing is noted."""


@dataclass
class Kind:
    """Blocks alike: `differing` are (part, attribute) that tell them apart, `refused` says that
    one is read; `seen` are the blocks that ran, by the kind of their inputs."""

    differing: dict[str, frozenset[str]]
    seen: dict[Any, _Seen] = field(default_factory=dict)
    refused: bool = False


@dataclass(frozen=True)
class _Seen:
    """A block that ran, its inputs, its operators, and its result: tensors with their nodes."""

    block: nn.Module
    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    result: Any
    attributes: object
    """What its parts held, kept so that nothing else takes the place that it is known by."""


class Unlike(Exception):
    """Inputs or results are no plain values and tensors."""


@dataclass
class Repeats:
    """The repeated blocks of a model; `used` says that one was noted without being run, `watching`
    that one is run whose numbers are watched."""

    notes: Notes
    used: bool = False
    watching: bool = False

    @contextmanager
    def under_way(self, module: nn.Module) -> Iterator[None]:
        """Let repeated blocks go through here while the module runs."""
        changed = []
        for kind, blocks in alike(module):
            for block in blocks:
                changed.append(block)
                vars(block)["forward"] = Once(self._forward, kind, block)
        try:
            yield
        finally:
            for block in changed:
                vars(block).pop("forward", None)

    def _forward(self, kind: Kind, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.called(kind, block, partial(type(block).forward, block, *args, **kwargs),
                           args, kwargs)

    def called(self, kind: Kind, block: nn.Module, run: Callable[[], Any],
               args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a block of a kind gives: by `run`, if none ran that does the same."""
        if kind.refused or self.notes.wrote:
            return run()
        found: list[torch.Tensor] = []
        try:
            asked = self._described((args, kwargs), found)
            inputs = tuple(map(self.notes.node, found))
        except Unlike:
            return run()
        if not self._arrays(block).isdisjoint(inputs):  # which of the two an operator reads?
            return run()
        outside = tuple(n if n.op == "placeholder" else inputs.index(n) for n in inputs)
        state = signature(block, kind.differing)  # what its parent has just set, too
        key = (asked, outside, modes(), state)
        if key in kind.seen:
            return self._again(kind.seen[key], block, inputs)
        return self._first(kind, key, block, inputs, run)

    def _first(self, kind: Kind, key: tuple[object, ...], block: nn.Module,
               inputs: tuple[fx.Node, ...], run: Callable[[], Any]) -> Any:
        """Run a block and keep what it did."""
        last = next(iter(reversed(self.notes.graph.nodes)))
        held = [dict(vars(part)) for part in _parts(block)]
        self.watching = bool(kind.differing)  # code that sets what is watched fails
        with _watched(block, kind.differing) as read:
            result = run()
        self.watching = False
        made = tuple(_after(last))
        try:
            self._described(result, [])
            copied = frozenset(filter(self.notes.copied, made))
            said = _mapped(result, lambda x: (self.notes.node(x), x))
        except Unlike:
            kind.refused = True
        if kind.refused or read or self.notes.wrote or \
                signature(block, kind.differing) != key[-1]:
            kind.refused = True
            return result
        kind.seen[key] = _Seen(block, inputs, tuple(n for n in made if n in copied), said,
                               held)
        return result

    def _arrays(self, block: nn.Module) -> set[fx.Node | None]:
        """The nodes of the arrays of a block."""
        return {self.notes.array(part, name) for part in _parts(block)
                for name in (*part._parameters, *part._buffers)}

    def _again(self, seen: _Seen, block: nn.Module, inputs: tuple[fx.Node, ...]) -> Any:
        """Note the operators of a block that ran for one that does the same."""
        self.used = True
        notes, now = self.notes, dict(zip(seen.inputs, inputs, strict=True))
        paths: dict[str, str] = {}
        for old, new in zip(_parts(seen.block), _parts(block), strict=True):
            paths[notes.place_of(old)] = notes.place_of(new)
            for name in (*old._parameters, *old._buffers):
                here, there = notes.array(old, name), notes.array(new, name)
                if here is not None and there is not None:
                    now[here] = there
        for node in seen.nodes:
            made = now[node] = again(notes.graph, node, lambda n: now.get(n, n))
            made.meta["nn_module_stack"] = {
                paths.get(key, key): (paths.get(where, where), rest)
                for key, (where, rest) in node.meta["nn_module_stack"].items()}

        def returned(pair: tuple[fx.Node, torch.Tensor]) -> torch.Tensor:
            node, old = pair
            value = notes.another(old)
            notes.note(value, now.get(node, node))
            return value

        return _mapped(seen.result, returned)

    def _described(self, value: object, found: list[torch.Tensor]) -> Any:
        """The kind of a call's values, tensors by sizes; raises Unlike for what is none of these.
        """
        if isinstance(value, torch.Tensor):
            found.append(value)
            return self.notes.kind(value)
        if isinstance(value, PLAIN):
            return type(value), value
        if type(value) is tuple:
            return tuple([self._described(part, found) for part in value])
        if type(value) is dict:
            return tuple([(name, self._described(part, found)) for name, part in value.items()])
        raise Unlike


# --- what is alike --------------------------------------------------------------------------------


def alike(module: nn.Module) -> Iterator[tuple[Kind, list[nn.Module]]]:
    """Yield kinds of blocks with those of each, where there are at least two."""
    for part in list(module.modules()):
        kinds: dict[Any, list[nn.Module]] = {}
        children = dict.fromkeys(child for child in part._modules.values() if child is not None)
        types = Counter(map(type, children))
        for child in children:
            if types[type(child)] > 1 and "forward" not in vars(child) and \
                    len(list(islice(child.named_modules(remove_duplicate=False), PARTS))) == PARTS:
                kinds.setdefault(signature(child), []).append(child)
        for blocks in kinds.values():
            if len(blocks) > 1:
                yield Kind(differing(blocks)), blocks


class _Watched(dict[str, Any]):
    """Buffers of a module, and `names` of others: which of these is asked for is noted in `read`.

    They are found in `numbers`, or where a block around this one is watched.
    """

    def __init__(self, buffers: dict[str, Any], names: frozenset[str], numbers: Mapping[str, Any],
                 read: set[str]) -> None:
        super().__init__(buffers)
        self._under, self._names, self._numbers, self._read = buffers, names, numbers, read

    def __contains__(self, name: object) -> bool:
        return name in self._names or super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            return super().__getitem__(name)
        self._read.add(name)
        return self._numbers[name] if name in self._numbers else self._under[name]


@contextmanager
def _watched(block: nn.Module, differing: Mapping[str, frozenset[str]]) -> Iterator[set[str]]:
    """Collect which of the attributes are read meanwhile.

    They are taken out of the modules and found where arrays are, whatever object stands for the
    module: a tracer puts others in its place, which share its attributes.
    """
    read: set[str] = set()
    was: list[tuple[dict[str, Any], dict[str, Any]]] = []
    parts: dict[nn.Module, frozenset[str]] = {}
    for path, names in differing.items():  # a part may stand in several places
        part = block.get_submodule(path)
        parts[part] = parts.get(part, frozenset()) | names
    try:
        for part, names in parts.items():
            own = vars(part)
            was.append((own, dict(own)))
            read.update(n for n in names if hasattr(type(part), n))  # it would be found there
            held = {n: own.pop(n) for n in names if n in own}
            own["_buffers"] = _Watched(own["_buffers"], names, held, read)
        yield read
    finally:
        for own, before in was:
            buffers, now = dict(own.pop("_buffers")), dict(own)
            before["_buffers"].clear()
            before["_buffers"].update(buffers)
            own.clear()
            own.update({**before, **now})  # in the order that they had


# --- inputs, results and operators ----------------------------------------------------------------


def _mapped(value: object, change: Callable[[Any], Any]) -> Any:
    """A result with its tensors, or with what was kept of them as (node, tensor), changed."""
    if isinstance(value, torch.Tensor) or _is_kept(value):
        return change(value)
    if type(value) is tuple:
        return tuple([_mapped(part, change) for part in value])
    if type(value) is dict:
        return {name: _mapped(part, change) for name, part in value.items()}
    return value


def _is_kept(value: object) -> bool:
    return type(value) is tuple and len(value) == 2 and isinstance(value[0], fx.Node)


def _parts(block: nn.Module) -> list[nn.Module]:
    return [part for _, part in block.named_modules(remove_duplicate=False)]


def _after(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that follow in a graph."""
    while node.next.op != "root":
        node = node.next
        yield node
