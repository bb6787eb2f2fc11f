"""A compile on the processor and on a GPU: whether both say the same, and what the GPU saves.

    python benchmarks/gpu.py                         # SmolLM2-135M, the first accelerator
    python benchmarks/gpu.py --device cuda:1 --importance curvature --allocation measured
    python benchmarks/gpu.py --model ~/checkpoint --recovery "lora(epochs=1)" --dtype bfloat16
    python benchmarks/gpu.py --device cpu            # the processor against itself: all agrees

Turn by turn, in this process, the same compile runs on both; the first turn on the device is not
counted (it starts the device). Cells: seconds by the clock of the steps that a device takes part
in, the largest memory on the device. Then: the share of kept slices that both plans have in
common, and both proofs.
Slices whose scores are equal but for rounding may be chosen otherwise; a plan that shares less than
99% of its slices fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from typing import Any

import torch

import spacompiler
from spacompiler.evidence.where import devices, find

LEAST = 0.99


class Clock:
    """Seconds by stage, as progress is told."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._stage, self._since = "", time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Count what went by for the stage before."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] += now - self._since  # type: ignore[assignment]
        self._stage, self._since = stage.partition(":")[0], now


def compiled(asked: argparse.Namespace, device: str) -> tuple[Any, Counter[str], float]:
    """Compile once; the result, seconds by stage, and MB on the device."""
    clock = Clock()
    options = {name: getattr(asked, name) for name in (
        "importance", "allocation", "repair", "recovery", "dtype", "samples", "length",
        "calibration")}
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    made = spacompiler.compile(asked.model, target=asked.target, device=device, onnx=False,
                               latency=False, progress=clock, **options)
    clock("", 0, 0)
    memory = 0.0 if device == "cpu" else torch.accelerator.max_memory_allocated() / 1e6
    return made, clock.seconds, memory


def common(one: Any, other: Any) -> float:
    """The share of one plan's kept slices that another keeps too."""
    pairs = [(_places(kept), _places(other.plan.kept.get(name, ())))
             for name, kept in one.plan.kept.items()]
    return sum(len(a & b) for a, b in pairs) / max(1, sum(len(a) for a, _ in pairs))


def _places(kept: Any) -> set[Any]:
    """The slices of a group, by outer slice where that has its own."""
    return {(i, each) for i, row in enumerate(kept) for each in row} \
        if kept and isinstance(kept[0], (list, tuple)) else set(kept)


def main() -> int:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="zoo:smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--target", default="body=60%")
    parser.add_argument("--importance", default="taylor")
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--repair", default="refit")
    parser.add_argument("--recovery", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--calibration", help="as of a compile: a file, sampled, own, python")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2)
    asked = parser.parse_args()
    device = str(find(asked.device, asked.dtype).device)
    if device == "cpu" != asked.device:
        print(f"there is no accelerator here: torch finds {', '.join(devices())}")
        return 2
    compiled(asked, device)
    best: list[Counter[str]] = [Counter(), Counter()]
    for _ in range(asked.turns):
        turn = [compiled(asked, each) for each in ("cpu", device)]
        for i, (_, seconds, _) in enumerate(turn):
            if not best[i] or seconds.total() < best[i].total():
                best[i] = seconds
    (here, _, _), (there, _, most) = turn
    print(f"| stage | cpu, s | {device}, s | times |\n|---|---|---|---|")
    for stage in (*best[0], "all"):
        one, other = (seconds.total() if stage == "all" else seconds[stage] for seconds in best)
        print(f"| {stage} | {one:.2f} | {other:.2f} | {other / max(one, 1e-9):.2f} |")
    share = common(here, there)
    print(f"\nkept slices in common: {share:.4f}; proofs {here.job.proof.error:.1e} and "
          f"{there.job.proof.error:.1e}; at most {most:.0f} MB on {device}")
    return int(share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
