"""Allocations beside each other, by what the pruned and repaired network does on unseen data.

    python benchmarks/search.py                          # all models, 50% stays
    python benchmarks/search.py --model resnet --share 65

Prints, for each model, the divergence from the dense network (KL, mean over results) on data that
no allocation saw, the best one-shot allocation, and `search` as a share of it; then one plan under
two limits at once. All take the same scores, repair and data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from small_images import digits, trained
from torch import nn

import spacompiler
from spacompiler.evidence.losses import distance, first_floating
from spacompiler.models_zoo import load
from spacompiler.torch_backend.weights import results

ONE_SHOT = ("uniform", "global", "dynamic", "standardised")
MEASURED = ("tried", "measured")
LANGUAGE = ("llama-gqa", "gpt2")
Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]


def subject(name: str, seed: int = 0) -> tuple[nn.Module, Batches, Batches]:
    """Return a model, batches to calibrate on, and batches to judge by."""
    draws = torch.Generator().manual_seed(seed)
    if name in LANGUAGE:
        module, _ = load(name).build()
        made = [((), {"input_ids": torch.randint(0, 61, (8, 24), generator=draws),
                      "use_cache": False}) for _ in range(16)]
        return module, made[:8], made[8:]
    x, _, test_x, _ = digits(seed)
    return trained(name, seed=seed), [((part,), {}) for part in x[:256].split(64)], \
        [((part,), {}) for part in test_x.split(128)]


def divergence(pruned: nn.Module, dense: nn.Module, batches: Batches) -> float:
    """Return the mean KL divergence of a pruned network's results from the dense one's."""
    total = 0.0
    for args, kwargs in batches:
        got, want = (first_floating(results(m, args, kwargs)) for m in (pruned, dense))
        total += float(distance(got, want)) / len(batches)
    return total


def compiled(name: str, target: str, allocation: str) -> tuple[float, dict[str, Any], float]:
    """Return (divergence on unseen data, costs, CPU seconds) of one allocation."""
    module, batches, held_out = subject(name)
    start = time.process_time()
    made = spacompiler.compile(
        module, (batches[0][0] or batches[0][1]), target=target, allocation=allocation,
        importance="taylor", calibration=batches, align=1, layout="any", floor=0.1, onnx=False,
        latency=False, prove=False, quiet=True)
    spent = time.process_time() - start
    return divergence(made.module, module, held_out), made.plan.costs, spent


def table(name: str, share: int, allocations: Sequence[str]) -> None:
    """Print the divergence of each allocation, and that of search beside the best one-shot one."""
    metric = "body" if name in LANGUAGE else "macs"
    print(f"\n{name}, {metric}={share}%")
    found = {}
    for allocation in allocations:
        lost, costs, spent = compiled(name, f"{metric}={share}%", allocation)
        found[allocation] = lost
        left = costs[metric]["pruned"] / costs[metric]["dense"]
        print(f"  {allocation:24} {lost:9.5f}  {left:6.1%}  {spent:6.1f} s", flush=True)
    best = min((n for n in found if n in ONE_SHOT), key=found.__getitem__)
    last = allocations[-1]
    print(f"  {last} / best one-shot ({best}): {found[last] / found[best]:.3f}")


def two_limits(name: str, share: int, allocation: str) -> None:
    """Print what stays of two costs under two limits, of which one allocation meets one."""
    first, second = ("body", "macs") if name in LANGUAGE else ("params", "macs")
    target = f"{first}={share}%,{second}={share}%"
    for one in ("global", allocation):
        try:
            lost, costs, _ = compiled(name, target, one)
        except spacompiler.SpaError as problem:
            print(f"  {target} by {one}: {problem.why}")
            continue
        left = ", ".join(f"{m} {costs[m]['pruned'] / costs[m]['dense']:.1%}"
                         for m in (first, second))
        print(f"  {target} by {one}: {left}, divergence {lost:.5f}")


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="repeatable")
    parser.add_argument("--share", type=int, default=50)
    parser.add_argument("--search", default="search")
    options = parser.parse_args()
    for name in options.model or ("llama-gqa", "resnet"):
        table(name, options.share, (*ONE_SHOT, *MEASURED, options.search))
        two_limits(name, options.share, options.search)


if __name__ == "__main__":
    main()
