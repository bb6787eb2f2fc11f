"""How much memory and disk there is: what a container may take counts, not what the machine has."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

GROUPS = (("memory.max", "memory.current"),
          ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of memory in control groups, of the newer and the older kind."""


def memory(root: Path = Path("/sys/fs/cgroup"), info: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that this process may still take, None where nothing tells.

    What the system holds of files counts as free: it can be let go.
    """
    found = [free for free in (_within(root, *names) for names in GROUPS) if free is not None]
    try:
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return min(found) // max(here, 1) if found else None


def _within(root: Path, limit: str, use: str) -> int | None:
    """What a control group leaves, None where it has no limit."""
    try:
        most, now = int((root / limit).read_text()), int((root / use).read_text())
        files = [int(line.split()[1]) for line in
                 ((root / limit).parent / "memory.stat").read_text().splitlines()
                 if line.startswith(("inactive_file ", "active_file "))]
    except (OSError, ValueError, IndexError):
        return None
    return None if most >= 1 << 60 else max(0, most - now + sum(files))


def disk(place: Path) -> int | None:
    """Return the bytes that are free where a path lies or will lie, None where no disk is."""
    folder = place.absolute()
    while not folder.exists():
        folder = folder.parent
    found = shutil.disk_usage(folder)
    return found.free if found.total else None
