"""Read JSON that anybody may have written: bounded, of the form that is expected, or one error.

A form says what data may look like, and is data itself:

    str, int, float, bool, object     of that type (whole numbers are no truth values)
    [form]                            a list
    {str: form}                       an object with any keys
    {"key": form, "other?": form}     an object with these keys, some of which may be missing
    (form, other)                     one of them; plain strings in it stand for themselves
    function                          says whether the data will do; its docstring says what will

>>> parse('{"a": [1, 2]}', {"a": [int]}, "x.json")
{'a': [1, 2]}
>>> mismatch({"a": [1, "2"]}, {"a": [int], "b?": str})
'.a[1] is no int'
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import SpaError

BYTES = 2**28
"""Larger files are not read."""
DEPTH = 64
"""Deeper nests are not read: whatever follows data by recursion stays far from its limits."""
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)

Form: TypeAlias = ("type | str | list[Form] | tuple[Form, ...] | Mapping[Any, Form] | "
                   "Callable[[Any], bool] | None")


def read(path: Path, form: Form = object, fix: str = "") -> Any:
    """Read a JSON file; raises SpaError unless it is a file, sound, small enough and of the form.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        if found.st_size > BYTES:
            raise ValueError(f"it has {found.st_size:,} bytes, more than {BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise _unreadable(path.name, str(path.parent), str(problem), fix) from problem
    return parse(text, form, path.name, where=str(path.parent), fix=fix)


def parse(text: str, form: Form, name: str, *, where: str = "", fix: str = "") -> Any:
    """Read JSON text; raises SpaError, naming it `name`, unless it is sound and of the form."""
    try:
        _check_depth(text)
        data = json.loads(text, object_pairs_hook=_distinct, parse_constant=_finite,
                          parse_float=_finite)
    except (ValueError, RecursionError) as problem:
        raise _unreadable(name, where, str(problem), fix) from problem
    wrong = mismatch(data, form)
    if wrong:
        raise _unreadable(name, where, wrong, fix)
    return data


def _unreadable(name: str, where: str, why: str, fix: str) -> SpaError:
    return SpaError(f"{name} cannot be read", where=where, why=why, fix=fix)


def _check_depth(text: str) -> None:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > DEPTH:
            raise ValueError(f"it is nested deeper than {DEPTH} levels")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands in it twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


# --- forms ----------------------------------------------------------------------------------------


def mismatch(data: object, form: Form, path: str = "") -> str:
    """Return "" if data has a form, else the first place that has not, and what it should be."""
    if isinstance(form, tuple):
        found = [mismatch(data, one, path) for one in form]
        return "" if "" in found else f"{path or 'it'} is none of {', '.join(map(_said, form))}"
    if isinstance(form, list):
        return _in_list(data, form[0], path)
    if isinstance(form, Mapping):
        return _in_object(data, form, path)
    fits = data == form if isinstance(form, str) or form is None else \
        _is(data, form) if isinstance(form, type) else form(data)
    return "" if fits else f"{path or 'it'} is no {_said(form)}"


def _is(data: object, kind: type) -> bool:
    if isinstance(data, bool):
        return kind in (bool, object)
    return isinstance(data, (int, float) if kind is float else kind)


def _in_list(data: object, form: Form, path: str) -> str:
    if not isinstance(data, list):
        return f"{path or 'it'} is no list"
    return next(filter(None, (mismatch(part, form, f"{path}[{i}]")
                              for i, part in enumerate(data))), "")


def _in_object(data: object, form: Mapping[Any, Any], path: str) -> str:
    if not isinstance(data, dict):
        return f"{path or 'it'} is no object"
    if str in form:
        return next(filter(None, (mismatch(part, form[str], f"{path}[{key!r}]")
                                  for key, part in data.items())), "")
    for name, inner in form.items():
        key = name.removesuffix("?")
        if key not in data and key == name:
            return f"{path or 'it'} lacks {key!r}"
        wrong = mismatch(data[key], inner, f"{path}.{key}") if key in data else ""
        if wrong:
            return wrong
    return ""


def _said(form: Form) -> str:
    if isinstance(form, list):
        return "list"
    if isinstance(form, Mapping):
        return "object"
    if isinstance(form, type):
        return form.__name__
    return str(form.__doc__ or "").strip(". ").lower() if callable(form) else repr(form)
