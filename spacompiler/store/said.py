"""How objects, and what lies on this machine, are named in files: equal in every process.

>>> said(object())
'object()'
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def said(what: object) -> str:
    """Return an object's repr without addresses: of what has none of its own, its name."""
    if type(what).__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
        return f"{type(what).__name__}()"
    return _ADDRESS.sub("", repr(what))


def nameless(data: object, paths: Iterable[str]) -> Any:
    """Return data with absolute paths left out of its strings: files and folders keep their names.

    Left out are the folders of the given paths (those that are absolute), the current folder and
    the user's own.

    >>> nameless({"model": "/data/nets/a.onnx"}, ["/data/nets/a.onnx"])
    {'model': 'a.onnx'}
    """
    folders = {str(Path(p).parent) for p in paths if Path(p).is_absolute()}
    folders |= {str(Path.cwd()), str(Path.home())}
    return _without(data, sorted(folders - {"/"}, key=len, reverse=True))


def _without(data: object, folders: list[str]) -> Any:
    if isinstance(data, str):
        for folder in folders:
            data = data.replace(f"{folder}/", "").replace(folder, ".")
        return data
    if isinstance(data, Mapping):
        return {key: _without(value, folders) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without(value, folders) for value in data]
    return data
