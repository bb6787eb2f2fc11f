"""Calibration windows chosen by the prototype metric of data pruning, against random draws.

    python benchmarks/choice.py --data DIR --seed 0 --seed 1 --seed 2

DIR holds wikitext2/valid.txt (calibration), wikitext2/test.raw and ptb/valid.txt (evaluation), as
for `quality.py`. SmolLM2-135M-Instruct loses MLP channels by Wanda, the same share in each layer,
and is refit, both on the same few windows: drawn, nearest to the centres of k-means, or farthest
from them (`--choice random`, `near`, `far`). A seed draws windows, and the first centre. Prints the
perplexities of each choice and seed, and their means with the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from quality import texts

import spacompiler
from spacompiler.evidence.losses import perplexity
from spacompiler.evidence.prototypes import CHOICES, by_prototype
from spacompiler.sources import named as source


def order(choice: str, table: torch.Tensor, seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what orders windows (n, length) by a choice."""
    if choice != "random":
        return by_prototype(table, choice, seed)
    draws = torch.Generator().manual_seed(seed)
    return lambda ids: torch.randperm(len(ids), generator=draws)


def main() -> None:
    """Print a line for each choice and seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with wikitext2/ and ptb/")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--target", default="body=65%")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="their tokens")
    parser.add_argument("--windows", type=int, default=6, help="evaluation windows per text")
    given = parser.parse_args()
    found = source.load("zoo:smollm2-135m")
    ids, evaluated = texts(found.tokenizer, given.data, given.windows)
    ids = ids.reshape(-1, given.length)
    table = found.module.get_input_embeddings().weight.detach()
    lines: dict[str, list[list[float]]] = {choice: [] for choice in CHOICES}
    for seed in given.seed or (0, 1, 2):
        for choice in CHOICES:
            some = ids[order(choice, table, seed)(ids)[: given.samples]]
            made = spacompiler.compile(
                found.module, {"input_ids": some[:2], "use_cache": False}, target=given.target,
                importance="wanda", allocation="uniform", repair="refit", only=("*.mlp.*",),
                calibration=[{"input_ids": part} for part in some.split(4)], layout="any",
                onnx=False, latency=False, prove=False, quiet=True)
            lines[choice].append([perplexity(made.module, rows, batch=2)
                                  for rows in evaluated.values()])
            print(f"seed {seed} {choice:8}" + "".join(
                f" {text} {value:.2f}" for text, value in zip(
                    evaluated, lines[choice][-1], strict=True)), flush=True)
    for choice, rows in lines.items():
        print(f"{choice:15}" + "".join(
            f" {text} {mean(values):.2f} ({stdev(values) if len(values) > 1 else 0:.2f})"
            for text, values in zip(evaluated, zip(*rows, strict=True), strict=True)))


if __name__ == "__main__":
    main()
