"""Carry out a notebook's cells in one namespace, and hold what they show against what is stored.

A kernel is not needed: the last expression of a cell is shown as a notebook shows it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

SHOWN = {"text/html": "_repr_html_", "image/svg+xml": "_repr_svg_"}
"""What a notebook takes in place of a value's text, and the methods that give it."""
ROUNDED = re.compile(r"\d+\.\d+(e[-+]\d+)?")
"""Numbers that are no counts: their last digits differ from processor to processor."""


def cells(path: Path) -> list[dict[str, Any]]:
    """Return the cells of a notebook."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def carried_out(path: Path) -> list[list[dict[str, Any]]]:
    """Return what each cell of code shows, as outputs of the notebook format."""
    space: dict[str, Any] = {"__name__": "__main__"}
    return [_outputs("".join(cell["source"]), space)
            for cell in cells(path) if cell["cell_type"] == "code"]


def stored(path: Path) -> list[list[dict[str, Any]]]:
    """Return what the notebook says that its cells show."""
    return [cell["outputs"] for cell in cells(path) if cell["cell_type"] == "code"]


def store(path: Path, outputs: list[list[dict[str, Any]]]) -> None:
    """Write other outputs into a notebook."""
    whole, turn = json.loads(path.read_text(encoding="utf-8")), iter(outputs)
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = next(turn)
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def steady(outputs: list[list[dict[str, Any]]]) -> str:
    """Return outputs as text, without what differs from machine to machine."""
    return ROUNDED.sub("…", json.dumps(outputs, indent=1, ensure_ascii=False))


def _outputs(source: str, space: dict[str, Any]) -> list[dict[str, Any]]:
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    said, found = io.StringIO(), None
    with contextlib.redirect_stdout(said):
        exec(compile(ast.Module(body, []), "<cell>", "exec"), space)
        if isinstance(last, ast.Expr):
            found = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
    made: list[dict[str, Any]] = []
    if said.getvalue():
        made.append({"name": "stdout", "output_type": "stream", "text": _lines(said.getvalue())})
    if found is not None:
        made.append({"output_type": "display_data", "metadata": {}, "data": _shown(found)})
    return made


def _shown(value: object) -> dict[str, list[str]]:
    """A value as text, and as a table or a picture where it has one."""
    rich = {kind: _lines(getattr(value, name)()) for kind, name in SHOWN.items()
            if hasattr(value, name)}
    return {**rich, "text/plain": _lines(repr(value))}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
