"""What a sweep of four sizes costs, and how well targets in time are met.

    python benchmarks/sizes.py [sweep] [latency] [MODEL ...]

`sweep`: CPU seconds of four sizes over those of one compile (with its files). `latency`: the share
of the dense network's time that is left at latency=60%, timed anew after the compile, turn by turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import spacompiler
from spacompiler.models_zoo import load

MODELS = ("llama-gqa", "resnet", "vit")
SIZES = (0.9, 0.75, 0.6, 0.5)
TARGET = "latency~60%"


def given(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model of the zoo, its inputs, and what it is compiled with."""
    module, inputs = load(name).build()
    generator = torch.Generator().manual_seed(0)
    tokens = [{"input_ids": torch.randint(0, 60, (2, 12), generator=generator)} for _ in range(4)]
    more = {"calibration": tokens} if isinstance(inputs, dict) and "input_ids" in inputs else {}
    return module, inputs, {"align": 1, **more}


def sweep(name: str) -> None:
    """Print the cost of four sizes over that of one compile."""
    module, inputs, more = given(name)
    spacompiler.compile(module, inputs, target="params~75%", dry_run=True, **more)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        spacompiler.compile(module, inputs, target="params~75%", out=Path(folder, "o"), **more)
        one = time.process_time() - started
    started = time.process_time()
    spacompiler.sweep(module, inputs, sizes=SIZES, **more)
    four = time.process_time() - started
    print(f"{name:12} one compile {one:5.1f} s, four sizes {four:5.1f} s: {four / one:.2f}",
          flush=True)


def latency(name: str) -> None:
    """Print what a target in time comes to."""
    module, inputs, more = given(name)
    with tempfile.TemporaryDirectory() as folder:
        found = spacompiler.compile(module, inputs, target=TARGET, out=Path(folder, "o"), **more)
        times = found.report["latency"]
        share = times["pruned"]["cpu_median_ms"] / times["dense"]["cpu_median_ms"]
        print(f"{name:12} {TARGET}: {share:.1%} of the dense network's CPU time", flush=True)


def main(arguments: list[str]) -> int:
    """Run what is asked for, or both."""
    kinds = {"sweep": sweep, "latency": latency}
    chosen = [kinds[a] for a in arguments if a in kinds] or list(kinds.values())
    for name in [a for a in arguments if a not in kinds] or MODELS:
        for run in chosen:
            run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
