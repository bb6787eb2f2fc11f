"""Checks of artifact directories that need no torch, so that mistakes are told at once."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SpaError, UsageError

MANIFEST = "MANIFEST.json"


def check_out(out: Path, **beside: Path | None) -> Path:
    """Raise UsageError unless `out` can be made: it must not exist, its parent be writable.

    `beside` are directories that are written to meanwhile, by name: they cannot lie in it.
    """
    out = Path(out)
    for name, place in beside.items():
        if place is not None:
            _check_beside(name, Path(place), out)
    if os.path.lexists(out):
        raise UsageError(f"output {str(out)!r} exists already",
                         fix="give a new directory, or remove it first")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"output {str(out)!r} cannot be made", why=f"{parent} is not writable",
                         fix="give a directory that you may write to")
    return out


def _check_beside(name: str, place: Path, out: Path) -> None:
    """Raise UsageError for a directory of one's own (work, checkpoint) that cannot be beside `out`.
    """
    inside = out.absolute()
    if place.absolute() == inside or inside in place.absolute().parents:
        raise UsageError(f"{name} {str(place)!r} lies in the output {str(out)!r}",
                         why="the output appears as a whole, at the end", fix="give another place")
    for part in (place, *place.absolute().parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(f"{name} {str(place)!r} cannot be made", why=f"{part} is a file",
                                 fix="give a directory")
            break


def check_artifact(folder: Path) -> None:
    """Raise SpaError unless `folder` looks like an artifact."""
    if not folder.is_dir():
        raise SpaError(f"there is no artifact at {str(folder)!r}", why="no such directory",
                       fix="give a directory written by `spacompiler compile`")
    if not (folder / MANIFEST).is_file():
        raise SpaError(f"{str(folder)!r} is no artifact", why=f"it holds no {MANIFEST}",
                       fix="give a directory written by `spacompiler compile`")
