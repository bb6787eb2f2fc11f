"""Code that a user names, as `module:object` or `file.py:object`: a model, a pass, a function."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def imported(place: str) -> ModuleType:
    """Return a module by its name, looked for in the working directory too, or that of a file.

    Raises whatever the code raises; ImportError where there is none.
    """
    if place.endswith(".py"):
        return _from_file(place)
    with _looking_in(os.getcwd()):
        return importlib.import_module(place)


@contextmanager
def _looking_in(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _from_file(path: str) -> ModuleType:
    """Run a Python file that the user named, once, as a module of its own.

    What lies beside it may be imported by it.
    """
    whole = Path(path).resolve()
    name = f"_named_{hashlib.sha256(str(whole).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not whole.is_file():
        raise ImportError(f"there is no file {path!r}")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _looking_in(str(whole.parent)):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
