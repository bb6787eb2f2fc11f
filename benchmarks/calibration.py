"""CPU time and peak memory of scoring a model by each criterion, each in a process of its own.

    python benchmarks/calibration.py                      # SmolLM2-135M, 64 windows of 512 tokens
    python benchmarks/calibration.py --only wanda --also my_file.py:MyCriterion
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

ROWS = (
    "magnitude", "wanda", "fluctuation", "cfsp", "obs", "curvature", "taylor",
    "taylor(per='batch')", "taylor(per='example')", "taylor-vector",
    "taylor-element(per='batch')", "taylor-element", "taylor-element(order=2)",
    "taylor-element(order='mixed')", "gblm", "lora-gradient")


def measure(model: str, name: str, samples: int, length: int, batch: int) -> dict[str, Any]:
    """Score every channel and head group of a model; no plan is made."""
    from spacompiler.pipeline.analyse import analyse
    from spacompiler.pipeline.request import Given, make_request
    from spacompiler.pipeline.score import score
    from spacompiler.request import registry
    from spacompiler.request.recipe import Recipe
    from spacompiler.sources import named as source

    recipe = Recipe("params=80%", importance=name, samples=samples, length=length, batch=batch)
    found = source.load(model)
    ask, subject, traced = analyse(*make_request(found.module, found.inputs, recipe, Given(
        own=found.calibration, tokenizer=found.tokenizer, name=found.name)))
    before, wall = time.process_time(), time.monotonic()
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    score(ask, subject, traced)
    return {"criterion": name, "needs": " ".join(registry.find("importance", name).needs),
            "seconds": time.process_time() - before, "wall": time.monotonic() - wall,
            "windows": sum(len(k["input_ids"]) if k else len(a[0])
                           for a, k in ask.calibration.batches),
            "before": base / 2**20, "peak": resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:smollm2-135m")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--only", action="append", help="a criterion of the table; repeatable")
    parser.add_argument("--also", action="append", default=[], help="another one; repeatable")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    settings = (options.samples, options.length, options.batch)
    if options.one:
        print(json.dumps(measure(options.model, options.one, *settings)))
        return
    print(f"{options.model}: {options.samples} windows of {options.length} tokens, "
          f"batches of {options.batch}\n")
    print("| criterion | needs | CPU seconds | peak GiB | GiB before scoring |")
    print("|---|---|---|---|---|")
    for name in (*(options.only or ROWS), *options.also):
        command = [sys.executable, __file__, "--one", name, "--model", options.model, *(
            f"--{key}={value}" for key, value in zip(("samples", "length", "batch"), settings,
                                                     strict=True))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} | | | |")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {row['needs']} | {row['seconds']:.0f} | {row['peak']:.2f} | "
              f"{row['before']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
