"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..artifact.report import table_rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """Return a table of strings; columns of numbers stand right."""
    made = Table(title=Text(title) if title else None, title_justify="left")
    for i, name in enumerate(head):
        numbers = all(str(r[i])[:1].isdigit() or not str(r[i]) for r in rows) and bool(rows)
        made.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def compiled(data: Mapping[str, Any]) -> Table:
    """Return the table that ends a compile."""
    return table(("", "dense", "pruned", "stays"), table_rows(data),
                 f"{data['model']}: {data['target']}")
