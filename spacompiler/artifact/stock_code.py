"""What an artifact may name as its network: a model class of transformers, and no other code."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SpaError
from ..store.folder import read_json
from ..torch_backend.own_layers import auto_map

CODE = ("auto_map", "custom_pipelines")
"""Entries of a configuration that name code which came along with it."""
_PACKAGE = "transformers.models."


class SourceNeeded(SpaError):
    """The dense network is needed, and only the user may say what it is: its code is run."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the network {name!r} cannot be built from the artifact alone",
            why="what an artifact names is followed to the zoo and to transformers' classes only",
            fix="give the dense model: load(dir, model=module), or --source MODEL")


def check(file: Path, cls: Any = None) -> dict[str, Any]:
    """Read a configuration; raises SpaError if it is damaged or names code elsewhere.

    That of a model class may name the file that this compiler writes for it: nobody here runs it.
    """
    data: dict[str, Any] = read_json(file)
    ours = cls is not None and "auto_map" in data and data["auto_map"] == auto_map(cls)
    for key, value in _entries({k: v for k, v in data.items() if not ours or k != "auto_map"}):
        if key in CODE or (key.endswith("_implementation") and "/" in str(value)):
            raise SpaError(f"{file.name} cannot be used", where=str(file.parent),
                           why=f"its {key} names code from elsewhere",
                           fix="give a directory written by `spacompiler compile`")
    return data


def class_of(path: str) -> Any:
    """Return a model class of transformers by its full name; raises SourceNeeded for another."""
    from transformers import PreTrainedModel

    module, _, name = path.rpartition(".")
    if not path.startswith(_PACKAGE) or not re.fullmatch(r"[\w.]+", path):
        raise SourceNeeded(path)
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as problem:
        raise SpaError(f"transformers has no class {path!r}", why=str(problem),
                       fix="install the version that the model was compiled with") from problem
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SourceNeeded(path)
    return found


def _entries(config: object) -> Iterator[tuple[str, Any]]:
    if isinstance(config, dict):
        yield from config.items()
    for part in config.values() if isinstance(config, dict) else \
            config if isinstance(config, list) else ():
        yield from _entries(part)
