"""Integers that know where they came from, through arithmetic and comparison.

>>> heads, dims = Sized.held(4, ("attn", "num_heads")), Sized.held(8, ("attn", "head_dim"))
>>> width = heads * dims
>>> width == 32, width.value({("attn", "num_heads"): 2})
(True, 16)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ...rows.findings import Path

Key = tuple[str, str]
Heard = Callable[["Sized", int], bool]
_HEARD: ContextVar[Heard | None] = ContextVar("_HEARD", default=None)
_DISTINCT: ContextVar[bool] = ContextVar("_DISTINCT", default=False)


@contextmanager
def comparing(heard: Heard, distinct: bool) -> Iterator[None]:
    """Ask `heard` whether a marked integer equals a plain one.

    Marked integers that are `distinct` have hashes of their own: what a cache holds for plain
    ones is not found for them.
    """
    tokens = _HEARD.set(heard), _DISTINCT.set(distinct)
    try:
        yield
    finally:
        _HEARD.reset(tokens[0])
        _DISTINCT.reset(tokens[1])


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

    def __deepcopy__(self, memo: object) -> Sized:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __hash__(self) -> int:
        return hash((int(self), self.keys)) if _DISTINCT.get() else int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        heard = _HEARD.get()
        if heard is None or not self.plain or type(other) is not int:
            return int.__eq__(self, other)
        return heard(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _value(x: int, env: Mapping[Key, int]) -> int:
    return x.value(env) if isinstance(x, Sized) else x


def _arithmetic(name: str, swapped: bool) -> Callable[[Sized, Any], Any]:
    function = getattr(operator, name)

    def method(self: Sized, other: object) -> Any:
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


def sizes_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Sized]]:
    """Sizes among the arguments; those given one by one (`x.view(2, 3)`) count as a list."""
    first = 0 if args and isinstance(args[0], int) else 1
    if len(args) > first + 1 and all(isinstance(a, int) for a in args[first:]):
        args = (*args[:first], args[first:])
    for i, value in enumerate(args):
        yield from _inside(("args", i), value)
    for key, value in kwargs.items():
        yield from _inside(("kwargs", key), value)


def _inside(path: Path, value: object) -> Iterator[tuple[Path, Sized]]:
    if isinstance(value, Sized):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _inside((*path, i), part)
    elif isinstance(value, slice):
        yield from _inside(path, (value.start, value.stop))
