"""What calibrated compiles cost: the least squares of a repair, and covariances beyond memory.

    python benchmarks/scale_calibrated.py refit 2048
    python benchmarks/scale_calibrated.py room

`refit` fits one consumer that keeps so many of its features (three quarters) by eigenvectors, as
`refit` did before, and by Cholesky factors, as it does: CPU seconds of both, turn by turn, the
least of two, and whether they say the same. The first factored one seeks its ridge from the
middle of the grid, the others from the ridge of the layer before. `room` gathers covariances of
several layers in memory and in files: CPU seconds, and the growth of memory that cannot be given
back.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

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


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("refit", "room"))
    parser.add_argument("sizes", nargs="*", type=int, default=[1024, 2048])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "refit":
        refit(asked.sizes)
    else:
        in_room(6, 2048)


if __name__ == "__main__":
    main()
