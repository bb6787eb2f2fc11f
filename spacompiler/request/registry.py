"""Find passes: by name, by `module:object` or `file.py:object`, or as the object itself.

Built-in and third-party passes come in by one door, entry points in the groups
`spacompiler.importance`, `.allocation`, `.schedule`, `.compensation` and `.recovery`; nothing is
imported before it is asked for.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError, did_you_mean
from .code import imported

Row = TypeVar("Row")
KINDS = ("importance", "allocation", "schedule", "compensation", "recovery")


_METHODS = {"importance": "score", "allocation": "allocate", "compensation": "solve",
            "recovery": "run", "schedule": "run"}


WORDS: Mapping[str, tuple[str, ...]] = {
    "compensation": ("auto", "none"), "importance": ("auto",),
    "allocation": ("auto",)}
"""What callers take in place of a pass."""


def available() -> Iterator[tuple[str, EntryPoint]]:
    """Yield (kind, entry point) of every installed pass, by kind and name."""
    for kind in KINDS:
        for entry in _installed(kind):
            yield kind, entry


def _installed(kind: str) -> Sequence[EntryPoint]:
    """Entry points of a kind, by name: read anew once a place of packages has changed."""
    return _read(tuple((place, _changed(place)) for place in sys.path))[kind]


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1)
def _read(places: tuple[tuple[str, int], ...]) -> Mapping[str, Sequence[EntryPoint]]:
    """The entry points of all kinds: reading those of every package takes some milliseconds."""
    del places
    return {kind: sorted(entry_points(group=f"spacompiler.{kind}"), key=lambda e: e.name)
            for kind in KINDS}


def check_name(kind: str, text: str) -> None:
    """Raise UsageError for a misspelt name, without importing anything."""
    name, _ = parse(text)
    known = [*WORDS.get(kind, ()),
             *(entry.name for entry in _installed(kind))]
    if ":" in name:
        _checked_place(kind, name)
    elif name not in known:
        raise UsageError(f"unknown {kind} pass {name!r}", fix=did_you_mean(name, known))


def _checked_place(kind: str, name: str) -> tuple[str, str, str]:
    """Split `module:object` or `file.py:object`; raises UsageError for what is neither."""
    place, colon, attribute = name.rpartition(":")
    why = ""
    if not attribute.isidentifier():
        why = "there is no object's name behind the colon"
    elif place.endswith(".py"):
        why = "" if _is_file(place) else f"there is no file {place!r}"
    elif not all(part.isidentifier() for part in place.split(".")):
        why = f"{place!r} is no module's name"
    if why:
        raise UsageError(f"cannot load {kind} pass {name!r}", why=why,
                         fix="write module:object or file.py:object")
    return place, colon, attribute


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a name that no file can have
        return False


def find(kind: str, what: object) -> Any:
    """Return a pass object for a name, `module:object`, `file.py:object` or an object.

    Names may carry options: `name(option=value, ...)`.

    Raises UsageError for an unknown name, a failing import or an unfit object.
    """
    if not isinstance(what, str):
        return _checked(kind, what() if isinstance(what, type) else what, repr(what))
    name, options = parse(what)
    return _checked(kind, construct(_load(kind, name), options, what), what)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`taylor(mode='element')` -> ("taylor", {"mode": "element"})."""
    import ast

    name, paren, rest = text.partition("(")
    if not paren:
        return text.strip(), {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        return name.strip(), {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, AssertionError) as problem:
        raise UsageError(f"cannot read the options of pass {text!r}",
                         fix="write name(option=value, ...)") from problem


def row(table: Mapping[str, Callable[..., Row]], text: str, what: str) -> Row:
    """Return a new row of a table for `name(option=value, ...)`; `what` names the table's rows.

    Raises UsageError for an unknown name, or options that the row does not take.
    """
    name, options = parse(text)
    if name not in table:
        raise UsageError(f"unknown {what} {name!r}", fix=did_you_mean(name, table))
    made: Row = construct(table[name], options, text)
    return made


def _load(kind: str, name: str) -> Any:
    if ":" in name:
        place, _, attribute = _checked_place(kind, name)
        try:
            return getattr(imported(place), attribute)
        except Exception as problem:  # any code may run here
            raise UsageError(f"cannot load {kind} pass {name!r}",
                             why=str(problem) or type(problem).__name__) from problem
    entries = {entry.name: entry for entry in _installed(kind)}
    if name not in entries:
        raise UsageError(f"unknown {kind} pass {name!r}",
                         fix=did_you_mean(name, [*entries, *WORDS.get(kind, ())]))
    try:
        return entries[name].load()
    except (ImportError, AttributeError) as problem:
        raise UsageError(f"cannot load {kind} pass {name!r} ({entries[name].value})",
                         why=str(problem)) from problem


def construct(found: object, options: Mapping[str, Any], text: str) -> Any:
    """Return a pass made with options of its class; an object that is no class stands as it is.

    Raises UsageError for options that it does not take.
    """
    if not isinstance(found, type):
        return found
    try:
        return found(**options)
    except TypeError as problem:
        known = [f.name for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) \
            else []
        raise UsageError(f"cannot make pass {text!r}", why=str(problem),
                         fix=f"options: {', '.join(known) or 'none'}") from problem


def _checked(kind: str, found: object, text: str) -> Any:
    if not callable(getattr(found, _METHODS[kind], None)):
        raise UsageError(f"{text} is no {kind} pass", why=f"it has no {_METHODS[kind]}()")
    return found
