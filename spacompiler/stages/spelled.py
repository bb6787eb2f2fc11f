"""Passes as recipes and reports name them."""

from __future__ import annotations

import dataclasses

from ..request import registry
from ..store.said import said


def spelled(kind: str, found: object, asked: str = "") -> str:
    """Return a pass as a recipe names it, with all of its options; its repr if none can.

    Code that the user named stays named as it was.
    """
    if ":" in asked.partition("(")[0]:
        return asked
    name = getattr(found, "name", "")
    entry = next((e for k, e in registry.available() if (k, e.name) == (kind, name)), None)
    if entry is None or entry.load() is not type(found) or not dataclasses.is_dataclass(found):
        return said(found)
    options = ", ".join(f"{f.name}={getattr(found, f.name)!r}"
                        for f in dataclasses.fields(found) if f.init)
    return f"{name}({options})" if options else name
