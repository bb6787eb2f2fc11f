"""Sizes that a module's own Python code holds: found by watching what the code reads.

`x.view(b, n, self.num_heads, self.head_dim)` is right for the dense module only. To find which
attribute to change, the dense module runs once on its example inputs with every integer that it
holds marked by where it came from. Marks survive arithmetic, so that each torch call tells which
attributes its sizes follow from, and the re-written program tells what these sizes must be. No
class is named here.

>>> heads, dims = Sized.held(4, ("attn", "num_heads")), Sized.held(8, ("attn", "head_dim"))
>>> width = heads * dims
>>> width == 32, width.value({("attn", "num_heads"): 2})
(True, 16)
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..choices import Choices
from ..errors import SpaError
from ..frontends.running import follow, innermost_forward
from ..frontends.torch_export import Trace
from ..groups import Solution
from ..solver import Path
from .program import edits

Key = tuple[str, str]
Change = tuple[str, str, Any]
DEPTH = 2
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, nn.Module, torch.dtype,
          torch.device, type, type(sys))


# --- integers that modules hold ---------------------------------------------------------------


def held(module: nn.Module, kinds: Any = int) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of the integers that a module holds, sub-modules aside.

    They may lie in tuples and lists (`window_size.0`) and in objects with attributes of their
    own (`config.hidden_size`).
    """
    for name, value in vars(module).items():
        if not name.startswith("_"):
            yield from _held(name, value, DEPTH, kinds)


def _held(name: str, value: Any, depth: int, kinds: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, kinds) and not isinstance(value, bool):
        yield name, value
    elif depth:
        for key, part in _parts(value):
            yield from _held(f"{name}.{key}", part, depth - 1, kinds)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        yield from ((str(i), part) for i, part in enumerate(value[:64]))
    elif not isinstance(value, _PLAIN) and not callable(value):
        yield from ((k, v) for k, v in getattr(value, "__dict__", {}).items()
                    if not k.startswith("_"))


def assign(module: nn.Module, name: str, value: Any) -> None:
    """Set a dotted name; what holds it is copied first, as other modules may share it."""
    first, _, rest = name.partition(".")
    setattr(module, first, _replaced(getattr(module, first), rest, value) if rest else value)


def _replaced(holder: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    if isinstance(holder, (tuple, list)):
        parts = list(holder)
        parts[int(first)] = _replaced(parts[int(first)], rest, value) if rest else value
        return type(holder)(parts)
    made = copy.copy(holder)
    vars(made)[first] = _replaced(vars(made)[first], rest, value) if rest else value
    return made


def differing(dense: nn.Module, pruned: nn.Module) -> Iterator[Change]:
    """Yield (path, dotted name, value) of every number in which two modules differ."""
    others = dict(dense.named_modules(remove_duplicate=False))
    for path, module in pruned.named_modules(remove_duplicate=False):
        old = dict(held(others[path], (int, float))) if path in others else {}
        for name, value in held(module, (int, float)):
            if name in old and old[name] != value:
                yield path, name, value


# --- marked integers --------------------------------------------------------------------------


class Sized(int):
    """An integer that knows which attributes it was computed from, and how."""

    keys: frozenset[Key]
    value: Callable[[Mapping[Key, int]], int]
    plain: bool

    @staticmethod
    def held(number: int, key: Key) -> Sized:
        """Mark an integer held at `key` = (module path, dotted name)."""
        return Sized._made(number, frozenset((key,)), lambda env: env.get(key, number), True)

    @staticmethod
    def _made(number: int, keys: frozenset[Key], value: Callable[[Mapping[Key, int]], int],
              plain: bool = False) -> Sized:
        made = int.__new__(Sized, number)
        made.keys, made.value, made.plain = keys, value, plain
        return made

    def __deepcopy__(self, memo: Any) -> Sized:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _value(x: Any, env: Mapping[Key, int]) -> int:
    return x.value(env) if isinstance(x, Sized) else x


def _arithmetic(name: str, swapped: bool) -> Callable[[Sized, Any], Any]:
    function = getattr(operator, name)

    def method(self: Sized, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        a, b = (other, self) if swapped else (self, other)
        keys = self.keys | (other.keys if isinstance(other, Sized) else frozenset())
        return Sized._made(function(int(a), int(b)), keys,
                           lambda env: function(_value(a, env), _value(b, env)))

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Sized, f"__{_name}__", _arithmetic(_name, False))
    setattr(Sized, f"__r{_name}__", _arithmetic(_name, True))


# --- watching a run ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Use:
    """A size that a torch call was given: in which module, at which line, as which argument."""

    where: str
    line: str
    path: Path
    size: Sized


@dataclass
class Watch(TorchFunctionMode):
    """Note every marked size that reaches a torch call."""

    names: Mapping[int, str]
    uses: list[Use] = field(default_factory=list)
    stack: list[str] = field(default_factory=lambda: [""])

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = list(_sizes(args, kwargs))
        if found:
            line = _line(sys._getframe(1))
            self.uses.extend(Use(self.stack[-1], line, path, size) for path, size in found)
        return func(*args, **kwargs)

    def modules(self) -> AbstractContextManager[None]:
        """Follow which module is running."""
        return follow(self.names, self.stack)


def _sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Sized]]:
    """Sizes among the arguments; those given one by one (`x.view(2, 3)`) count as a list."""
    first = 0 if args and isinstance(args[0], int) else 1
    if len(args) > first + 1 and all(isinstance(a, int) for a in args[first:]):
        args = (*args[:first], args[first:])
    for i, value in enumerate(args):
        yield from _inside(("args", i), value)
    for key, value in kwargs.items():
        yield from _inside(("kwargs", key), value)


def _inside(path: Path, value: Any) -> Iterator[tuple[Path, Sized]]:
    if isinstance(value, Sized):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _inside((*path, i), part)
    elif isinstance(value, slice):
        yield from _inside(path, (value.start, value.stop))


def _line(frame: Any) -> str:
    """The innermost line of a `forward`, as the tracer names the places of its nodes."""
    frame = innermost_forward(frame)
    if frame is None:
        return ""
    return f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"


def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Use]:
    """Run a marked copy of a module (its parameters are shared) and return the sizes it uses.

    Raises SpaError where its code refuses marked integers.
    """
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    marked = copy.deepcopy(module, memo).eval()
    for path, part in marked.named_modules():
        for name, value in list(held(part)):
            assign(part, name, Sized.held(value, (path, name)))
    watching = Watch({id(part): path for path, part in marked.named_modules()})
    try:
        with torch.no_grad(), watching.modules(), watching:
            marked(*args, **kwargs)
    except Exception as problem:  # any code may run here
        raise SpaError("the sizes that the module's code reads cannot be watched",
                       why=f"{type(problem).__name__}: {problem}".splitlines()[0]) from problem
    return watching.uses


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
        self._at: dict[tuple[str, str], list[Any]] = {}
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


def _argument(node: Any, path: Path) -> Any:
    value: Any = node.args if path[0] == "args" else node.kwargs
    try:
        for step in path[1:]:
            value = value[step]
    except (IndexError, KeyError, TypeError):
        return None
    return value
