"""A directory that keeps what a compile has finished, so that one that was killed goes on.

Each entry is one safetensors file, replaced whole, with the sha256 of what it holds. The directory
says of which compile it is (model, recipe, data, versions); the work of another one is refused, and
an entry that is damaged counts as not there. Nothing in it is unpickled or run.

    with Work.opened(folder, {"model": "5f...", "recipe": "..."}) as work:
        scores = work.kept("scores", make)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import SpaError, UsageError
from ..system.group import here
from ..system.messages import Message, decoded, encoded
from ..system.staging import held, sync, told

FACTS = "work.json"
"""The file that says of which compile a directory is."""


class Work:
    """What is finished of one compile; of several processes the first reads and writes.

    `notes` say what was found to be damaged.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str]) -> None:
        self.folder, self.notes = folder, list[str]()
        self._key = _sha(json.dumps(dict(facts), sort_keys=True).encode())
        self._lock: int | None = None
        self._writes = here().first
        if self._writes:
            try:
                self._open(facts)
            except BaseException:
                self.close()
                raise
        here().of_first(lambda: "open", "the work")

    def _open(self, facts: Mapping[str, str]) -> None:
        """Make the directory, or see that it is this compile's and nobody else's now."""
        with told(f"the work {str(self.folder)!r}", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            place = self.folder / FACTS
            if not place.exists():
                if any(p for p in self.folder.iterdir() if not p.name.endswith(".part")):
                    raise UsageError(f"{str(self.folder)!r} holds other files",
                                     fix="give a new or empty directory as --work")
                self._write(place, lambda part: part.write_text(
                    json.dumps(dict(facts), indent=1, sort_keys=True) + "\n", encoding="utf-8"))
        _check(place, facts)

    def kept(self, name: str, make: Callable[[], Message]) -> Message:
        """Return what is kept under a name, or make it and keep it.

        All processes make it where it is not there.
        """
        have = self.read(name)
        if have is None:
            have = make()
            self.write(name, have)
        return have

    def read(self, name: str) -> Message | None:
        """Return what is kept under a name, or None."""
        found = self._read(name) if here().first else None
        heard = [said for said in here().in_turn(found, f"kept {name}") if said is not None]
        return heard[0] if heard else None

    def _read(self, name: str) -> Message | None:
        place = self._place(name)
        if not place.exists():
            return None
        try:
            with safe_open(place, "pt") as file:
                data, about = file.get_tensor("message"), file.metadata() or {}
            if about.get("work") == self._key and about.get("sha256") == _sha(data.numpy().data):
                return decoded(data)
            why = "its hash is another"
        except Exception as problem:  # safetensors raises its own kinds
            why = str(problem).splitlines()[0]
        self.notes.append(f"{place.name} of the kept work is damaged and was made again: {why}")
        return None

    def write(self, name: str, message: Message) -> None:
        """Keep something under a name; raises SpaError if the disk is full."""
        if not self._writes:
            return
        data = encoded(message)
        about = {"work": self._key, "sha256": _sha(data.numpy().data)}
        place = self._place(name)
        with told(f"the work {place.name!r}", self.folder):
            self._write(place, lambda part: save_file({"message": data}, part, metadata=about))

    def forget(self, name: str) -> None:
        """Keep no more what is under a name."""
        if self._writes:
            self._place(name).unlink(missing_ok=True)
        here().of_first(lambda: "gone", "forgetting")

    def _place(self, name: str) -> Path:
        """The file of a name; long ones, and such as no file can have, go by their hash."""
        plain = len(name) < 100 and all(c.isalnum() or c in "-_" for c in name)
        return self.folder / f"{name if plain else _sha(name.encode())[:32]}.safetensors"

    def _write(self, place: Path, write: Callable[[Path], object]) -> None:
        """Let a file appear whole."""
        part = place.with_name(f"{place.name}.part")
        write(part)
        sync(part)
        os.replace(part, place)
        sync(place.parent)

    def close(self) -> None:
        """Let another process take the directory."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None


def _locked(folder: Path) -> int | None:
    """Hold a directory; raises UsageError if another process does."""
    try:
        return held(folder)
    except BlockingIOError:
        raise UsageError(f"{str(folder)!r} is being worked in", why="another process holds it",
                         fix="wait for it, or give another --work") from None


def _check(place: Path, facts: Mapping[str, str]) -> None:
    """Raise an error unless a directory is of this compile."""
    try:
        have = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(have, dict):
            raise ValueError("it holds no names")
        differ = sorted(k for k in {*have, *facts} if have.get(k) != facts.get(k))
    except (OSError, ValueError, TypeError) as problem:
        raise SpaError("the kept work cannot be read", where=str(place), why=str(problem),
                       fix="remove the directory to start anew") from problem
    if differ:
        raise UsageError("the kept work is of another compile", where=str(place.parent),
                         why=f"{', '.join(differ)} differ" + _shown(have, facts, differ),
                         fix="ask for the same again, give another --work, or remove it")


def _shown(have: Mapping[str, str], facts: Mapping[str, str], differ: list[str]) -> str:
    """The first difference, where it is short enough to say."""
    was, now = (str(each.get(differ[0], "nothing")) for each in (have, facts))
    return f" ({differ[0]}: {was} then, {now} now)" if len(was + now) < 120 else ""


def _sha(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
