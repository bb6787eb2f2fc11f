"""Kill a compile while it writes, again and again: is anything half-made, is anything left?

    python benchmarks/kills.py [--times 100] [--disks 20]

Each child (a fork of this process, so that starting costs nothing) writes the same artifact to the
same place and is killed after a random time; every fifth gets SIGTERM in place of SIGKILL. After
each, the place holds a whole artifact (its hashes are right) or none. After the last, one run that
nobody kills must leave the artifact and nothing beside it.

Then the artifact is written to disks of so many sizes, too small but for the last (file systems in
memory, which only root can mount): each must end in one clear error with nothing left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError
from spacompiler.store import folder as artifact

QUICK: dict[str, Any] = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False}


def child(result: spacompiler.Result, out: Path) -> int:
    """Fork; the child writes the artifact and ends. Returns its number."""
    number = os.fork()
    if number == 0:
        try:
            result.save(out)
        finally:
            os._exit(0)
    return number


def full_disks(result: spacompiler.Result, times: int, whole: int) -> str:
    """Write to disks of `times` sizes up to `whole` bytes, and say how that ended."""
    clear = raw = left = written = 0
    for i in range(1, times + 1):
        disk = Path(tempfile.mkdtemp(prefix="disk-"))
        size = max(1, whole * i // times // 4096)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 4096}", "tmpfs", disk],
                       check=True)
        try:
            result.save(disk / "out")
            written += not artifact.check_manifest(disk / "out")
        except SpaError:
            clear += 1
            left += any(disk.iterdir())
        except BaseException as problem:
            raw += 1
            print(f"{size} pages: {type(problem).__name__}: {problem}")
        finally:
            subprocess.run(["umount", disk], check=True)
            disk.rmdir()
    return (f"{times} disks: {clear} clear errors, {raw} others, {written} whole artifacts; "
            f"something left on a full one: {left}")


def main() -> None:
    """Print how often a child was stopped, and what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--disks", type=int, default=0)
    asked = parser.parse_args()
    times = asked.times
    torch.set_num_threads(1)
    result = spacompiler.compile("zoo:mlp", target="macs=65%", **QUICK)
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    out = root / "out"
    began = time.perf_counter()
    os.waitpid(child(result, out), 0)
    whole = time.perf_counter() - began
    shutil.rmtree(out)
    killed = half = left = 0
    random.seed(0)
    runs = 0
    while killed < times:
        runs += 1
        number = child(result, out)
        time.sleep(random.uniform(0, whole))
        os.kill(number, signal.SIGTERM if runs % 5 == 4 else signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        killed += os.WIFSIGNALED(status)
        left += any(p.name != "out" for p in root.iterdir())
        if out.exists():
            half += bool(artifact.check_manifest(out))
            shutil.rmtree(out)
    os.waitpid(child(result, out), 0)
    beside = [p.name for p in root.iterdir() if p.name != "out"]
    print(f"{runs} runs, {killed} stopped by a signal while they wrote ({left} times a temporary "
          f"directory lay there); half-made: {half}; left after the next run: {len(beside)}; "
          f"whole: {not artifact.check_manifest(out)}")
    if asked.disks:
        net = nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 64))
        result = spacompiler.compile(net, (torch.randn(4, 64),), target="params=65%", **QUICK)
        result.save(root / "large")
        pages = sum(-(-p.stat().st_size // 4096) for p in (root / "large").iterdir())
        print(full_disks(result, asked.disks, pages * 4096))
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
