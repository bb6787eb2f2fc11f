"""Learned gates against scores in one shot on small image classifiers, after equal training.

    python benchmarks/gates.py --share 50 --model resnet

A ResNet or a ViT is trained on scikit-learn's digits (1,200 images; 597 are held out for the
accuracies), pruned to a share of its MACs, and trained for some epochs, all weights. A row that
learns gates spends some of those steps on them. Every row sees the same images, and refits what
stays (and takes statistics of batch norms anew) on 256 of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from small_images import MODELS, accuracy, digits, trained
from torch.nn import functional

import spacompiler
from spacompiler.passes.bip import Bip
from spacompiler.passes.compresso import Compresso
from spacompiler.passes.ddp import Ddp
from spacompiler.passes.full import Full
from spacompiler.passes.gates import Gates
from spacompiler.passes.grasp_gates import GraspGates
from spacompiler.passes.lapp import Lapp
from spacompiler.passes.polarise import Polarise
from spacompiler.passes.tas import Tas

BATCH, LEARNING, EPOCHS = 60, 3, 6
ADAPTED = "adapters(targets='weight')"
ROWS: dict[str, Any] = {
    "magnitude": "magnitude", "taylor": "taylor",
    "gates": Gates(criterion="taylor", scales=0, rows=0, length=0, task=1.0),
    "grasp-gates": GraspGates(scales=0), "ddp": Ddp(), "compresso": Compresso(beside=ADAPTED),
    "lapp": Lapp(), "bip": Bip(), "polarise": Polarise(), "tas": Tas()}


def loss(results: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy with the labels of a batch."""
    return functional.cross_entropy(results[0], kwargs["labels"])


def cells(model: str, share: float, names: Sequence[str],
          seed: int) -> Iterator[tuple[str, float, float, float]]:
    """Yield (row, share of MACs, accuracy, CPU seconds)."""
    x, y, test_x, test_y = digits(seed)
    module = trained(model, seed=seed)
    yield "dense", 100.0, 100 * accuracy(module, test_x, test_y), 0.0
    batches = [{"input" if model != "vit" else "x": a, "labels": b}
               for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    for name in names:
        row, start = ROWS[name], time.process_time()
        gates = not isinstance(row, str)
        steps = LEARNING * len(batches) // (2 if name == "bip" else 1)
        found = spacompiler.compile(
            module, {k: v for k, v in batches[0].items() if k != "labels"},
            target=f"macs={share}%", layout="any", align=1, floor=0.05, onnx=False, latency=False,
            importance="magnitude" if gates else row, allocation="uniform", seed=seed, loss=loss,
            schedule=replace(row, steps=steps) if gates else "", calibration=batches[:4],
            repair="refit(batch_norm=True)" if model != "vit" else "refit",
            recover_data=batches, recovery=Full(
                lr=1e-3, epochs=EPOCHS - LEARNING * gates, accumulate=1, patience=99))
        costs = found.job.plan.costs["macs"]
        yield (name, 100 * costs["pruned"] / costs["dense"],
               100 * accuracy(found.module, test_x, test_y), time.process_time() - start)


def main() -> None:
    """Print one table for each model and share."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--share", action="append", type=float)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for model in given.model or ("resnet", "vit"):
        for share in given.share or (50.0,):
            print(f"\n### {model}, {share:g}% of MACs\n\n| row | MACs | accuracy | CPU s |\n"
                  "|---|---|---|---|", flush=True)
            for name, macs, after, spent in cells(model, share, given.only or list(ROWS),
                                                     given.seed):
                print(f"| {name} | {macs:.1f}% | {after:.1f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
