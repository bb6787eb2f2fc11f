"""Learned gates against scores in one shot on small image classifiers, after equal training.

    python benchmarks/gates.py --share 50 --model resnet --seed 0 --seed 1

A ResNet or a ViT is trained on scikit-learn's digits (1,200 images; 597 are held out for the
accuracies), pruned to a share of its MACs, and trained for six epochs, all weights. A row that
learns gates spends some of those epochs on them, as the table says. Every row sees the same images,
and refits what stays (and takes statistics of batch norms anew) on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import mean
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
from spacompiler.passes.progressive import Progressive
from spacompiler.passes.tas import Tas

BATCH, EPOCHS = 60, 6
ADAPTED = "adapters(targets='weight')"
# row -> pass, and how many of the epochs it learns; rates are for so few steps
ROWS: dict[str, tuple[Any, int]] = {
    "magnitude": ("magnitude", 0), "taylor": ("taylor", 0),
    "gates": (Gates(criterion="taylor", scales=0, rows=0, length=0, task=1.0), 1),
    "grasp-gates": (GraspGates(scales=0), 1),
    "ddp": (Ddp(lr=0.03, relaxation="soft-l0(start=1.0, end=0.05, spread=0.3)"), 2),
    "compresso": (Compresso(beside=ADAPTED, lr=0.3, beside_lr=1e-3,
                            relaxation="hard-concrete(spread=1.0)",
                            budget="lagrangian(lr=2.0, ramp=0.5)"), 2),
    "lapp": (Lapp(), 3), "bip": (Bip(), 3),
    "polarise": (Polarise(), 3), "tas": (Tas(), 3),
    "progressive": (Progressive(), 3)}


def loss(results: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy with the labels of a batch."""
    return functional.cross_entropy(results[0], kwargs["labels"])


def cells(model: str, share: float, names: Sequence[str],
          seed: int) -> Iterator[tuple[str, int, float, float, float]]:
    """Yield (row, epochs of learning, share of MACs, accuracy, CPU seconds)."""
    x, y, test_x, test_y = digits(seed)
    module = trained(model, seed=seed)
    yield "dense", 0, 100.0, 100 * accuracy(module, test_x, test_y), 0.0
    batches = [{"input" if model != "vit" else "x": a, "labels": b}
               for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True)]
    for name in names:
        (row, learning), start = ROWS[name], time.process_time()
        gates = not isinstance(row, str)
        steps = learning * len(batches) // (2 if name == "bip" else 1)  # two batches a step
        found = spacompiler.compile(
            module, {k: v for k, v in batches[0].items() if k != "labels"},
            target=f"macs={share}%", layout="any", align=1, floor=0.05, onnx=False, latency=False,
            importance="magnitude" if gates else row, allocation="uniform", seed=seed, loss=loss,
            schedule=replace(row, steps=steps) if gates else "", calibration=batches,
            repair="refit(batch_norm=True)" if model != "vit" else "refit",
            recover_data=batches, recovery=Full(
                lr=1e-3, epochs=EPOCHS - learning, accumulate=1, patience=99))
        costs = found.job.plan.costs["macs"]
        yield (name, learning, 100 * costs["pruned"] / costs["dense"],
               100 * accuracy(found.module, test_x, test_y), time.process_time() - start)


def main() -> None:
    """Print one table for each model and share: means over seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--share", action="append", type=float)
    parser.add_argument("--only", action="append", choices=list(ROWS))
    parser.add_argument("--seed", action="append", type=int)
    given = parser.parse_args()
    seeds, names = given.seed or [0], given.only or list(ROWS)
    for model in given.model or ("resnet", "vit"):
        for share in given.share or (50.0,):
            print(f"\n### {model}, {share:g}% of MACs, seeds {', '.join(map(str, seeds))}\n\n"
                  "| row | epochs of learning | MACs | accuracy | CPU s |\n|---|---|---|---|---|",
                  flush=True)
            for found in zip(*(cells(model, share, names, seed) for seed in seeds), strict=True):
                name, learning = found[0][:2]
                macs = ", ".join(dict.fromkeys(f"{cell[2]:.1f}" for cell in found))
                after, spent = (mean(cell[i] for cell in found) for i in (3, 4))
                print(f"| {name} | {learning or ''} | {macs}% | {after:.1f} | {spent:.0f} |",
                      flush=True)


if __name__ == "__main__":
    main()
