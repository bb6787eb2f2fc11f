"""Checks of artifact directories that need no torch, so that mistakes are told at once."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SpaError, UsageError

MANIFEST = "MANIFEST.json"


def check_out(out: Path) -> Path:
    """Raise UsageError unless `out` can be made: it must not exist, its parent be writable."""
    out = Path(out)
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


def check_artifact(folder: Path) -> None:
    """Raise SpaError unless `folder` looks like an artifact."""
    if not folder.is_dir():
        raise SpaError(f"there is no artifact at {str(folder)!r}", why="no such directory",
                       fix="give a directory written by `spacompiler compile`")
    if not (folder / MANIFEST).is_file():
        raise SpaError(f"{str(folder)!r} is no artifact", why=f"it holds no {MANIFEST}",
                       fix="give a directory written by `spacompiler compile`")
