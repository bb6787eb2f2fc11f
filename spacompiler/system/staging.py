"""Temporary directories that outlive no process: the one place that makes them.

A directory's name says which process made it (its number and when it started), and the process
holds a lock on it. What a dead process left, because it was killed or the power went, is swept
when the next one is made in the same place.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from ..errors import SpaError

try:
    import fcntl
except ImportError:  # no such locks on this system: the process's number decides
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\..*\.(\d+)-(\d+)-\d+\.part", re.DOTALL)
_NUMBERS = itertools.count()
_LABEL_BYTES = 120
_FULL = tuple(os.strerror(n) for n in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT))


class Scratch:
    """A new directory beside what it is for (default: where the system keeps temporary files).

    It vanishes with its `with` block, with `cleanup`, or with the last reference to it.

    Beside something, its mode is what the umask gives; else nobody but its user may look into it.

    Raises OSError if it cannot be made.
    """

    def __init__(self, parent: Path | None = None, label: str = "spacompiler") -> None:
        mode = 0o700 if parent is None else 0o777
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        sweep(parent)
        short = label.encode()[:_LABEL_BYTES].decode(errors="ignore")
        owner = f"{os.getpid()}-{_started(os.getpid()) or 0}"
        self.path = parent / f".{short}.{owner}-{next(_NUMBERS)}.part"
        os.mkdir(self.path, mode)
        self._finish = weakref.finalize(self, _remove, self.path, held(self.path), os.getpid())

    @property
    def name(self) -> str:
        """The path as text."""
        return str(self.path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *problem: object) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Remove the directory, if it is there still."""
        self._finish()


def _remove(path: Path, lock: int | None, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def held(path: Path) -> int | None:
    """Lock a directory; returns the open file that holds the lock, None where there are none.

    Raises BlockingIOError if another process holds it.
    """
    if fcntl is None:
        return None
    opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise
    except OSError:  # a file system without locks
        os.close(opened)
        return None
    return opened


def sweep(parent: Path) -> None:
    """Remove the temporary directories of this user in a place whose processes are dead."""
    try:
        entries = list(os.scandir(parent))
    except OSError:
        return
    for entry in entries:
        found = _NAME.fullmatch(entry.name)
        with suppress(OSError):  # another process may sweep as well, or hold it
            if found and entry.is_dir(follow_symlinks=False) and not _alive(*found.groups()) and \
                    entry.stat(follow_symlinks=False).st_uid == os.getuid():
                lock = held(Path(entry.path))
                shutil.rmtree(entry.path, ignore_errors=True)
                if lock is not None:
                    os.close(lock)


def _alive(pid: str, started: str) -> bool:
    """Whether a process is there still, and is the one that started then."""
    if Path("/proc/self/stat").exists():
        return _started(int(pid)) == started
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _started(pid: int) -> str:
    """When a process started, in the system's own ticks; "" if it is dead or nothing tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


# --- ending ---------------------------------------------------------------------------------------


class _Stop(BaseException):
    """A signal that asks the process to end."""


@contextmanager
def orderly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the block, so that it cleans up; they end the process then.

    A program that handles these signals itself is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) == 1:
            raise _Stop

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = [n for n in wanted if signal.getsignal(n) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        if caught:
            os.kill(os.getpid(), caught[0])


# --- the disk -------------------------------------------------------------------------------------


@contextmanager
def told(what: str, where: Path) -> Iterator[None]:
    """Raise what goes wrong with files in the block as one SpaError: `what` cannot be written."""
    try:
        yield
    except Exception as problem:  # libraries report a full disk in their own kinds
        full = any(words in str(problem) for words in _FULL)
        if isinstance(problem, SpaError) or not (isinstance(problem, OSError) or full or
                                                 type(problem).__name__ == "SafetensorError"):
            raise
        raise SpaError(
            f"{what} cannot be written", where=str(where), why=str(problem).splitlines()[0],
            fix="make room, or write to another place; nothing is left of this attempt"
                if full else "write to another place; nothing is left of this attempt"
        ) from problem


def settle(folder: Path) -> None:
    """Give all files in a directory the modes that the umask gives, and bring them to the disk."""
    mode = folder.stat().st_mode & 0o777
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            file = Path(place, name)
            file.chmod(mode & 0o666)
            sync(file)
        Path(place).chmod(mode)
        sync(Path(place))


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or a directory's list of files."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):  # nothing to wait for there
            raise
    finally:
        os.close(opened)
