"""Kill a compile while it writes, again and again: is anything half-made, is anything left?

    python benchmarks/kills.py [--times 100]

Each child (a fork of this process, so that starting costs nothing) writes the same artifact to the
same place and is killed after a random time; every fifth gets SIGTERM in place of SIGKILL. After
each, the place holds a whole artifact (its hashes are right) or none. After the last, one run that
nobody kills must leave the artifact and nothing beside it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

import spacompiler
from spacompiler.store import folder as artifact


def child(result: spacompiler.Result, out: Path) -> int:
    """Fork; the child writes the artifact and ends. Returns its number."""
    number = os.fork()
    if number == 0:
        try:
            result.save(out)
        finally:
            os._exit(0)
    return number


def main() -> None:
    """Print how often a child was stopped, and what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=100)
    times = parser.parse_args().times
    torch.set_num_threads(1)
    result = spacompiler.compile("zoo:mlp", target="macs=65%", importance="magnitude", align=1,
                                 latency=False, onnx=False)
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
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
