"""Run the commands of docs/systems.md, one for each system of the field.

    python benchmarks/systems.py                # all: some minutes
    python benchmarks/systems.py --only 7,22    # some

Prints a line for each command, and ends with exit code 1 where one of them failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "systems.md"
TOKENS = "tokens"
SHORT = re.compile(r"^(\w+) +((?:spacompiler|python) .*)$", re.M)
ROW = re.compile(r"^\| (\d+) \| (.*?) \| (.*?) \| ?(.*?) ?\|$", re.M)


@dataclass(frozen=True)
class System:
    """A row of the page: its number, the system, what stands for it, and commands to see it by."""

    number: int
    name: str
    stands: str
    commands: tuple[tuple[str, ...], ...]


def systems(page: str = "") -> list[System]:
    """Return the rows of the page, their commands written out in words."""
    page = page or PAGE.read_text(encoding="utf-8")
    short = dict(SHORT.findall(page))
    return [System(int(number), name, stands, tuple(
        _written_out(text, short) for text in re.findall(r"`([^`]+)`", commands)))
        for number, name, stands, commands in ROW.findall(page)]


def _written_out(text: str, short: dict[str, str]) -> tuple[str, ...]:
    first, *rest = shlex.split(text)
    return (*shlex.split(short.get(first, first)), *rest)


def tokens(place: Path) -> Path:
    """Draw the text that the page's commands calibrate and train on; returns its folder."""
    import numpy as np

    path = place / TOKENS
    if not path.exists():
        path.mkdir()
        for n in range(4):
            np.savez(path / f"{n}.npz",
                     input_ids=np.random.default_rng(n).integers(0, 61, (8, 16)))
    return path


def ran(words: Sequence[str], place: Path) -> str:
    """Run one command in this process; returns what went wrong, "" if nothing did.

    OUT among its words becomes a new directory below `place`, where the tokens are, too.
    """
    out = Path(tempfile.mkdtemp(dir=place)) / "out"
    words = [{"OUT": str(out), TOKENS: str(tokens(place))}.get(w, w) for w in words]
    if words[:4] == ["python", "-m", "pytest", "-q"]:
        return _tested(words[4:])
    if words[0] == "python":
        import runpy

        old, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = old
        return ""
    from typer.testing import CliRunner

    from spacompiler.cli.main import app

    done = CliRunner().invoke(app, words[1:])
    return "" if done.exit_code == 0 else \
        f"exit code {done.exit_code}: {(done.stderr or done.output or repr(done.exception))[-600:]}"


def _tested(words: Sequence[str]) -> str:
    import pytest

    code = pytest.main(["-qq", "-p", "no:cacheprovider", "--no-header", *words])
    return "" if code == 0 else f"pytest ended with {code!r}"


def _wanted(only: str) -> Iterator[System]:
    numbers = {int(n) for n in only.split(",") if n}
    return (s for s in systems() if not numbers or s.number in numbers)


def main() -> int:
    """Run what is asked for and print a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="numbers of rows, commas between")
    only, bad, done = parser.parse_args().only, 0, set()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as place:
        for system in _wanted(only):
            for words in system.commands:
                if words in done:
                    continue
                done.add(words)
                start = time.process_time()
                wrong = ran(words, Path(place))
                bad += bool(wrong)
                print(f"{system.number:3} {system.name:32} {time.process_time() - start:6.1f} s  "
                      f"{wrong or 'ok'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
