"""What calibrated compiles cost: the least squares of a repair, and covariances beyond memory.

    python benchmarks/scale_calibrated.py refit 2048
    python benchmarks/scale_calibrated.py room
    python benchmarks/scale_calibrated.py compile --size 1.2B --importance taylor --repair refit
    python benchmarks/scale_calibrated.py equal

`refit` fits one consumer that keeps so many of its features (three quarters) by eigenvectors, as
`refit` did before, and by Cholesky factors, as it does: CPU seconds of both, turn by turn, the
least of two, and whether they say the same. The first factored one seeks its ridge from the
middle of the grid, the others from the ridge of the layer before. `room` gathers covariances of
several layers in memory and in files: CPU seconds, and the growth of memory that cannot be given
back.

`compile` makes a checkpoint (see `scale.py`), compiles it in a process of its own on 16 windows of
128 tokens, and prints CPU seconds and the largest resident memory, beside the bar: four of its
largest blocks and 1.5 GB. `equal` scores SmolLM2-135M with batches one by one and in the order of
the program, and compares scores and plans to the bit.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import scale
import torch

from spacompiler.evidence import room
from spacompiler.evidence.statistics import Covariance
from spacompiler.passes.refit import GRID, Refit
from spacompiler.repair.evidence import Evidence, Told, of_dense

SAMPLES, TURNS = 2048, 2
P, R = ParamSpec("P"), TypeVar("R")


def layer(features: int, outputs: int) -> tuple[Covariance, torch.Tensor]:
    """Inputs that predict each other, some of them large, as a network's are; and weights."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, features // 8) @ torch.randn(features // 8, features)
    x = (x + torch.randn(SAMPLES, features)) * torch.rand(features).exp() ** 2
    found = Covariance()
    found.add(x.unsqueeze(0), 1)
    return found, torch.randn(outputs, features) / features**0.5


def by_eigenvectors(seen: Covariance, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The whole of a fit as it was: cross moments, and a decomposition in float64."""
    w = weight.double()
    cross = seen.gram[0] @ w.T
    evidence = Evidence(int(seen.seen[0]), seen.total[0], w @ seen.total[0], seen.gram[0], cross,
                        float((w.T * cross).sum()))
    return Refit().solve(w, evidence, kept, has_bias=False)[0]


def by_factors(seen: Covariance, weight: torch.Tensor, kept: torch.Tensor,
               start: int | None) -> tuple[torch.Tensor, Told]:
    """The whole of a fit as it is."""
    evidence = of_dense(seen, weight, 0)
    evidence.single, evidence.told = True, Told(start)
    return Refit().solve(weight.double(), evidence, kept, has_bias=False)[0], evidence.told


def _timed(run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[float, R]:
    start = time.process_time()
    found = run(*args, **kwargs)
    return time.process_time() - start, found


def refit(sizes: list[int]) -> None:
    """Print, by features kept and outputs, what both ways cost and whether they agree."""
    print("| kept | outputs | by eigenvectors, CPU s | by factors | times | first | "
          "off by | float32 says | ridge |\n|---|---|---|---|---|---|---|---|---|")
    for kept in sizes:
        features, outputs = kept * 4 // 3, kept // 2
        seen, weight = layer(features, outputs)
        marks = torch.zeros(features, dtype=torch.bool)
        marks[torch.randperm(features)[:kept]] = True
        first, (_, told) = _timed(by_factors, seen, weight, marks, None)
        old, new = [], []
        for _ in range(TURNS):
            seconds, want = _timed(by_eigenvectors, seen, weight, marks)
            old.append(seconds)
            seconds, (made, again) = _timed(by_factors, seen, weight, marks, told.ridge)
            new.append(seconds)
        off = (made - want).norm() / (want - weight).norm()
        print(f"| {kept} | {outputs} | {min(old):.2f} | {min(new):.2f} | "
              f"{min(new) / min(old):.2f} | {first:.2f} | {float(off):.0e} | {again.error:.0e} | "
              f"{GRID[again.ridge]:.2g} |", flush=True)


def _anonymous() -> float:
    """Megabytes of this process that no file stands behind."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0]) / 1024


def in_room(layers: int, features: int) -> None:
    """Print what covariances cost in memory and in files, and whether they are equal."""
    found = []
    for limit in (1 << 40, 0):
        room.LIMIT = limit
        torch.manual_seed(0)
        held, before, start = room.Room(), _anonymous(), time.process_time()
        sums = [Covariance(room=held) for _ in range(layers)]
        for _ in range(4):
            for each in sums:
                each.add(torch.randn(1, 256, features), 2)
        print(f"{'files' if not limit else 'memory'}: {8 * layers * features**2 / 1e6:.0f} MB of "
              f"sums, {time.process_time() - start:.2f} CPU s, "
              f"{_anonymous() - before:.0f} MB more that cannot be given back", flush=True)
        found.append(sums)
    print("equal, bit for bit" if all(torch.equal(a.gram, b.gram) for a, b in zip(
        *found, strict=True)) else "they differ")


def compiled(source: str, importance: str, repair: str) -> dict[str, float]:
    """Compile a checkpoint on random tokens in this process; CPU seconds and MB."""
    import spacompiler

    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(scale.VOCABULARY, (16, 128), generator=draws)
    start = time.process_time()
    with tempfile.TemporaryDirectory(dir=Path(source).parent) as folder:
        spacompiler.compile(
            source, target="body=50%", importance=importance, repair=repair, allocation="uniform",
            calibration=[{"input_ids": part} for part in ids.split(2)], out=Path(folder) / "out",
            onnx=False, latency=False, quiet=True)
    return {"seconds": time.process_time() - start,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def compiles(asked: argparse.Namespace) -> None:
    """Make a checkpoint, and print what each criterion takes."""
    place = asked.folder or Path(tempfile.mkdtemp())
    source = place / asked.size
    try:
        if not (source / scale.INDEX).exists():
            scale.make(source, asked.size)
        block = max(f.stat().st_size for f in source.glob("*.safetensors")) / 2**20
        bar = 4 * block + 1.5e9 / 2**20
        print(f"largest block {block:.0f} MB, bar {bar:.0f} MB\n"
              "| criterion | repair | CPU s | peak RSS MB | of the bar |\n|---|---|---|---|---|")
        for importance in asked.importance:
            done = subprocess.run(
                [sys.executable, __file__, "compile", "--one", str(source), importance,
                 asked.repair], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            print(f"| {importance} | {asked.repair} | {row['seconds']:.0f} | {row['memory']:.0f} | "
                  f"{row['memory'] / bar:.2f} |", flush=True)
    finally:
        if asked.folder is None:
            shutil.rmtree(place)


def equal(criteria: list[str]) -> None:
    """Print whether plans and scores are the same when a model is taken for a large one."""
    import spacompiler
    from spacompiler.torch_backend.gather import gradients

    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(scale.VOCABULARY, (16, 128), generator=draws)
    for importance in criteria:
        found, seconds = [], []
        for least in (1 << 62, 0):
            gradients.LARGE = least
            start = time.process_time()
            made = spacompiler.compile(
                "zoo:smollm2-135m", target="body=60%", importance=importance, repair="none",
                allocation="uniform", calibration=[{"input_ids": p} for p in ids.split(2)],
                dry_run=True, quiet=True)
            seconds.append(time.process_time() - start)
            found.append((made.plan.kept, made.job.scored.scores))
        (one, a), (other, b) = found
        same = one == other and all((a[name] == b[name]).all() for name in a)
        print(f"{importance}: {'equal, bit for bit' if same else 'they differ'}; "
              f"{seconds[0]:.1f} and {seconds[1]:.1f} CPU s", flush=True)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("refit", "room", "compile", "equal"))
    parser.add_argument("sizes", nargs="*", type=int, default=[1024, 2048],
                        help="features that are kept, for refit")
    parser.add_argument("--size", choices=scale.SIZES, default="0.4B")
    parser.add_argument("--importance", nargs="*", default=["wanda", "taylor", "obs"])
    parser.add_argument("--repair", default="refit")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made and kept")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.one:
        print(json.dumps(compiled(*asked.one)))
        return
    if asked.what == "compile":
        compiles(asked)
        return
    if asked.what == "equal":
        equal(asked.importance)
        return
    if asked.what == "refit":
        refit(asked.sizes)
    else:
        in_room(6, 2048)


if __name__ == "__main__":
    main()
