"""What a launcher (torchrun, accelerate, srun) says of the processes that it started.

>>> launched({})
>>> launched({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
(1, 2)
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import UsageError

MEETING = ("MASTER_ADDR", "MASTER_PORT")
"""Where the processes of a run meet."""
START = "torchrun --nproc-per-node N -m spacompiler compile ..."


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return (number of this process, how many there are), or None where there is one.

    Raises UsageError where there are several and nothing says how they meet.
    """
    said = {name: environment.get(name, "").strip() for name in ("RANK", "WORLD_SIZE", *MEETING)}
    if said["WORLD_SIZE"] in ("", "1"):
        return None
    words = ", ".join(f"{name}={said[name]}" for name in ("RANK", "WORLD_SIZE") if said[name])
    missing = [name for name in ("RANK", *MEETING) if not said[name]]
    if missing:
        raise UsageError(
            "the environment speaks of several processes, and not of where they meet",
            where=words, why=f"{', '.join(missing)} is not set",
            fix=f"start them by a launcher ({START}), or unset RANK and WORLD_SIZE")
    try:
        rank, size = int(said["RANK"]), int(said["WORLD_SIZE"])
    except ValueError:
        rank, size = -1, 0
    if not 0 <= rank < size:
        raise UsageError("the environment speaks of processes that cannot be", where=words,
                         why="RANK is a number from 0 to below WORLD_SIZE",
                         fix=f"start them by a launcher ({START}), or unset RANK and WORLD_SIZE")
    return rank, size
