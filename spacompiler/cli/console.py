"""What is said in a terminal: errors and progress on stderr, results on stdout."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import typer

from ..errors import SpaError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

Tick = Callable[[str, int, int], None]
EVERY = 10.0
"""Seconds between two lines on how far one stage has come."""
PIPE = 200
"""Columns of a table where there is no terminal to fit it to."""
_UNEQUAL = ("transformers.integrations.heterogeneity",)
"""What warns of each read of an entry that layers have of their own, right as it may be."""


def show(renderable: RenderableType, pipe: int = PIPE) -> None:
    """Print a table, as wide as the terminal; `pipe` columns where there is none."""
    from rich.console import Console

    streams = (sys.stdin, sys.stdout, sys.stderr)
    fits = "COLUMNS" in os.environ or any(s is not None and s.isatty() for s in streams)
    Console(width=None if fits else pipe).print(renderable)


@contextmanager
def errors(as_json: bool, out: Path | None = None) -> Iterator[None]:
    """Print a SpaError as one message on stderr and exit with its code.

    `out` is what appears as the last thing, whole: an interrupt says whether it is there.
    """
    before = False
    try:
        before = out is not None and out.exists()
        yield
    except SpaError as error:
        raise _told(error, as_json) from None
    except OSError as problem:
        raise _told(_of_the_system(problem), as_json) from None
    except KeyboardInterrupt:
        there = out is not None and out.exists() and not before
        print(f"interrupted: {out} was written, and is whole" if there else
              "interrupted: nothing written", file=sys.stderr)
        raise typer.Exit(130) from None


def _told(error: SpaError, as_json: bool) -> typer.Exit:
    """Print an error, and return the exit with its code."""
    if as_json:
        print(json.dumps({"error": error.what, "where": error.where, "why": error.why,
                          "fix": error.fix}))
    print(f"error: {error}", file=sys.stderr)
    return typer.Exit(error.code)


def _of_the_system(problem: OSError) -> SpaError:
    """Say what the operating system refused; a name that no file can have is the request's."""
    usage = problem.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    where = str(problem.filename) if problem.filename is not None else ""
    return (UsageError if usage else SpaError)(
        "a file or directory cannot be used", where=where,
        why=problem.strerror or str(problem), fix="see that it is there, and free space and rights")


@contextmanager
def progress(speaks: bool = True, quiet: bool = False,
             log_file: Path | None = None) -> Iterator[Tick]:
    """A progress bar on stderr; plain lines where stderr is no terminal, and in a log.

    Nothing where another process speaks for this one. Raises OSError for a log that cannot be
    written.
    """
    from ..system.process import at_level, no_warnings

    with no_warnings(), at_level(_UNEQUAL, logging.ERROR), \
            _lines_or_bar(speaks and not quiet) as shown, \
            _logged(log_file if speaks else None) as logged:
        def tick(stage: str, done: int, total: int) -> None:
            shown(stage, done, total)
            logged(stage, done, total)

        yield tick


@contextmanager
def _logged(place: Path | None) -> Iterator[Tick]:
    if place is None:
        yield _silent
        return
    with place.open("a", encoding="utf-8") as to:
        yield Lines(to=to)


def _silent(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@contextmanager
def _lines_or_bar(speaks: bool) -> Iterator[Tick]:
    if not speaks:
        yield _silent
        return
    if not sys.stderr.isatty():
        yield Lines()
        return
    from ..system.shown import bar

    with bar() as tick:
        yield tick


class Lines:
    """Progress as lines: each stage once, and what a stage says of its pace now and then.

    On stderr, or with the time of the day in a file.
    """

    def __init__(self, every: float = EVERY, to: TextIO | None = None) -> None:
        self._every, self._last, self._said, self._to = every, "", 0.0, to

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Print a line unless the same stage has had one a short while ago."""
        word, now = stage.partition(":")[0], time.monotonic()
        if word == self._last and done != total and now - self._said < self._every:
            return
        self._last, self._said = word, now
        paced = word in ("calibrating", "training")
        start = "…" if self._to is None else time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{start} {stage}" + (f" {done}/{total}" if paced else ""),
              file=self._to or sys.stderr, flush=True)
