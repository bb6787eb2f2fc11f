"""Progress where somebody looks on: a bar in a terminal or a notebook, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[str, int, int], None]


def looked_at() -> bool:
    """Whether stderr is a terminal, or the process a notebook's."""
    return (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules


@contextmanager
def bar() -> Iterator[Tick]:
    """Yield what shows (stage, done, total) as a bar, which is gone afterwards."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
               TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda stage, done, total: shown.update(
            task, description=stage, completed=done, total=total)


@contextmanager
def shown(given: Tick | None, quiet: bool) -> Iterator[Tick | None]:
    """Yield what was given, else a bar where somebody looks on and did not ask for silence."""
    if given is not None or quiet or not looked_at():
        yield given
        return
    with bar() as tick:
        yield tick
