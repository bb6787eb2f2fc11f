"""Sizes that a module's own Python code holds: found by watching what the code reads.

`x.view(b, n, self.num_heads, self.head_dim)` is right for the dense module only. To find which
attribute to change, the dense module runs once on its example inputs with every integer that it
holds marked by where it came from. Marks survive arithmetic, so that each torch call tells which
attributes its sizes follow from, and the re-written program tells what these sizes must be. No
class is named here.

A size that code only compares (`assert x.shape[1] == self.channels`) reaches no call. What was
equal in the dense module must be equal in the pruned one, so that this is run marked, too.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...axes.choices import Choices
from ...errors import SpaError
from ...graph.ir import Node
from ...groups.solution import Solution
from ...plan.effects import edits
from ...rows.findings import Path
from ..read.running import follow, innermost_forward
from ..trace import Trace
from .sized import Key, Sized, comparing, sizes_in
from .weightless import sharing, weightless

Change = tuple[str, str, Any]
Kinds = type | tuple[type, ...]
DEPTH = 2
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, nn.Module, torch.dtype,
          torch.device, type, type(sys))
_OWN = frozenset(vars(nn.Module()))


# --- integers that modules hold ---------------------------------------------------------------


def held(module: nn.Module, kinds: Kinds = int) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of the integers that a module holds, sub-modules aside.

    They may lie in tuples and lists (`window_size.0`), in dicts (`sizes.heads`) and in objects
    with attributes of their own (`config.hidden_size`).
    """
    for name, value in vars(module).items():
        if name not in _OWN:
            yield from _held(name, value, DEPTH, kinds)


def _held(name: str, value: object, depth: int, kinds: Kinds) -> Iterator[tuple[str, Any]]:
    if isinstance(value, kinds) and not isinstance(value, bool):
        yield name, value
    elif depth:
        for key, part in _parts(value):
            yield from _held(f"{name}.{key}", part, depth - 1, kinds)


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield from ((str(i), part) for i, part in enumerate(value[:64]))
    elif isinstance(value, dict):
        yield from ((k, v) for k, v in islice(value.items(), 64)
                    if isinstance(k, str) and "." not in k)
    elif not isinstance(value, _PLAIN) and not callable(value):
        yield from ((k, v) for k, v in _attributes(value) if not k.startswith("__"))


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    """The attributes that an object holds itself, in its dict or in slots."""
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name != "__dict__" and hasattr(value, name):
                yield name, getattr(value, name)


def assign(module: nn.Module, name: str, value: object) -> None:
    """Set a dotted name; what holds it is copied first, as other modules may share it."""
    first, _, rest = name.partition(".")
    setattr(module, first, _replaced(getattr(module, first), rest, value) if rest else value)


def _replaced(holder: object, name: str, value: object) -> Any:
    first, _, rest = name.partition(".")
    if isinstance(holder, (tuple, list)):
        parts = list(holder)
        parts[int(first)] = _replaced(parts[int(first)], rest, value) if rest else value
        make = getattr(type(holder), "_make", type(holder))  # a named tuple takes its fields apart
        return make(parts)
    made = copy.copy(holder)
    old = made[first] if isinstance(made, dict) else getattr(made, first)
    new = _replaced(old, rest, value) if rest else value
    if isinstance(made, dict):
        dict.__setitem__(made, first, new)
    if first in getattr(made, "__dict__", {}):
        vars(made)[first] = new
    elif not isinstance(made, dict):
        object.__setattr__(made, first, new)
    return made


def differing(dense: nn.Module, pruned: nn.Module) -> Iterator[Change]:
    """Yield (path, dotted name, value) of every number in which two modules differ."""
    others = dict(dense.named_modules(remove_duplicate=False))
    for path, module in pruned.named_modules(remove_duplicate=False):
        old = dict(held(others[path], (int, float, type(None)))) if path in others else {}
        for name, value in held(module, (int, float)):
            if name in old and old[name] != value:
                yield path, name, value


# --- watching a run ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """A size that a torch call was given: in which module, at which line, as which argument."""

    where: str
    line: str
    path: Path
    size: Sized


Place = tuple[Key, str]


@dataclass
class Watch(TorchFunctionMode):
    """Note every marked size that reaches a torch call, and those that plain ones equal.

    `equal` are held sizes by the lines that compare them; where one of `expected` is unequal, it
    is noted in `unmet` as what it is compared with, and the code goes on as if it were equal.
    """

    names: Mapping[int, str]
    expected: frozenset[Place] = frozenset()
    uses: list[Use] = field(default_factory=list)
    equal: set[Place] = field(default_factory=set)
    unmet: dict[Key, int] = field(default_factory=dict)
    stack: list[str] = field(default_factory=lambda: [""])

    def __post_init__(self) -> None:
        super().__init__()

    def compare(self, size: Sized, other: int) -> bool:
        """Return whether a marked size equals a plain number, or should."""
        same = int(size) == other
        (key,) = size.keys
        if same or self.expected:
            place = key, _line(sys._getframe(2))
            if same:
                self.equal.add(place)
            elif place in self.expected:
                self.unmet.setdefault(key, other)
                return True
        return same

    def __torch_function__(self, func: Callable[..., Any], types: Collection[type],
                           args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        """Note the sizes among the arguments of a torch function, and call it."""
        kwargs = kwargs or {}
        found = list(sizes_in(args, kwargs))
        if found:
            line = _line(sys._getframe(1))
            self.uses.extend(Use(self.stack[-1], line, path, size) for path, size in found)
        return func(*args, **kwargs)

    def modules(self) -> AbstractContextManager[None]:
        """Follow which module is running."""
        return follow(self.names, self.stack)


def _line(frame: FrameType | None) -> str:
    """The innermost line of a `forward`, as the tracer names the places of its nodes."""
    frame = innermost_forward(frame)
    if frame is None:
        return ""
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


@dataclass(frozen=True)
class Seen:
    """Sizes that a module's code uses, and where it compares held ones with equal numbers."""

    uses: tuple[Use, ...] = ()
    equal: frozenset[Place] = frozenset()


def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *,
          distinct: bool = False) -> Seen:
    """Run a marked copy of a module (its parameters are shared) and return the sizes it uses.

    With `distinct`, no cache knows the marked integers. Raises SpaError where the module's code
    refuses them.
    """
    watching, problem = _watched(module, args, kwargs, distinct=distinct)
    if problem is not None:
        raise SpaError("the sizes that the module's code reads cannot be watched",
                       why=f"{type(problem).__name__}: {problem}".splitlines()[0]) from problem
    return Seen(tuple(watching.uses), frozenset(watching.equal))


def unmet(pruned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
          seen: Seen) -> tuple[Change, ...]:
    """Return held sizes that differ from what the dense module's code finds them equal to."""
    if not seen.equal:
        return ()
    watching, _ = _watched(pruned, args, kwargs, expected=seen.equal)
    return tuple((*key, value) for key, value in watching.unmet.items())


def _watched(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *,
             expected: frozenset[Place] = frozenset(),
             distinct: bool = False) -> tuple[Watch, Exception | None]:
    """Watch a run without data, which sizes do not need; with data where code asks for some."""
    found = None if distinct else _run(*weightless(module, args, kwargs), expected, distinct)
    if found is None or found[1] is not None:
        found = _run(sharing(module), args, kwargs, expected, distinct)
    return found


def _run(marked: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
         expected: frozenset[Place], distinct: bool) -> tuple[Watch, Exception | None]:
    for path, part in marked.named_modules():
        for name, value in list(held(part)):
            assign(part, name, Sized.held(value, (path, name)))
    watching = Watch({id(part): path for path, part in marked.named_modules()}, expected)
    try:
        with torch.no_grad(), watching.modules(), watching, \
                comparing(watching.compare, distinct):
            marked(*args, **kwargs)
    except Exception as problem:  # any code may run here
        return watching, problem
    return watching, None


# --- what the attributes must be --------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Attributes to change, and the sizes that no attribute could be found for."""

    changes: tuple[Change, ...]
    problems: tuple[str, ...]


def resized(uses: Sequence[Use], trace: Trace, solution: Solution, choices: Choices) -> Sizes:
    """Return the attributes that give each watched size the value that the plan wants."""
    wanted = _Wanted(trace, solution, choices)
    env: dict[Key, int] = {}
    problems: list[str] = []
    later = []
    for use in uses:
        sizes = wanted.sizes(use)
        if not sizes:
            continue
        if not use.size.plain:
            later.append((use, sizes))
            continue
        (key,) = use.size.keys
        if env.setdefault(key, max(sizes)) not in sizes:
            problems.append(f"{'.'.join(filter(None, key))} = {int(use.size)} stands for two "
                            f"sizes ({use.line})")
    for use, sizes in later:
        if use.size.value(env) not in sizes and not _fit(use.size, sizes, env):
            problems.append(f"{int(use.size)} at {use.line} must become {min(sizes)}, and "
                            "attributes cannot say so")
    changes = tuple((*key, env[key]) for key, old in _dense(uses).items()
                    if env.get(key, old) != old)
    return Sizes(changes, tuple(dict.fromkeys(problems)))


def _dense(uses: Sequence[Use]) -> dict[Key, int]:
    return {key: use.size.value({}) if use.size.plain else -1
            for use in uses for key in use.size.keys}


def _fit(size: Sized, sizes: set[int], env: dict[Key, int]) -> bool:
    """Try the one attribute of a computed size that is still open."""
    free = [key for key in size.keys if key not in env]
    if len(free) != 1:
        return False
    for value in range(4 * int(size), 0, -1):
        if size.value({**env, free[0]: value}) in sizes:
            env[free[0]] = value
            return True
    return False


class _Wanted:
    """The sizes that the re-written program has at each place of the user's code."""

    def __init__(self, trace: Trace, solution: Solution, choices: Choices) -> None:
        self._new: dict[str, dict[Path, tuple[int, int]]] = {}
        for name, path, value, old in edits(solution, choices):
            if isinstance(value, int) and isinstance(old, int):
                self._new.setdefault(name, {})[path] = (value, old)
        self._at: dict[tuple[str, str], list[Node]] = {}
        for node in trace.graph.nodes:
            self._at.setdefault((node.where, node.source), []).append(node)

    def sizes(self, use: Use) -> set[int]:
        """Values that this size may have; empty if the program does not say."""
        nodes = self._at.get((use.where, use.line), [])
        old = int(use.size)
        exact = {self._new.get(n.name, {}).get(use.path, (old, old))[0] for n in nodes
                 if _argument(n, use.path) == old}
        if exact:
            return exact
        return {new for n in nodes for new, was in self._new.get(n.name, {}).values()
                if was == old}


def _argument(node: Node, path: Path) -> Any:
    value: Any = node.args if path[0] == "args" else node.kwargs
    try:
        for step in path[1:]:
            value = value[step]
    except (IndexError, KeyError, TypeError):
        return None
    return value
