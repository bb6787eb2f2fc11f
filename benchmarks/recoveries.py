"""Every recovery, after the same cut, on the same tokens: mean and spread over seeds.

    python benchmarks/recoveries.py
    python benchmarks/recoveries.py --only lora --only sora --seed 0 --seed 1

A small language model of bytes (`small_text.py`; another one for each seed) loses half of its body
by magnitude, with no repair, and is trained for two epochs on windows of the text that it learned
from. Printed are the perplexity on text that neither has seen, the CPU seconds of the compile, the
parameters that trained at the end, and the ranks of adapters where rows choose them (least and most
of a layer, in the first seed).
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import small_text
import torch

import spacompiler
from spacompiler.evidence.losses import perplexity

PACE = "epochs=2, accumulate=1, patience=99, logits=0.0"
ADAPTED, WHOLE = f"lr=4e-3, {PACE}", f"lr=1e-3, {PACE}"
ROWS: Mapping[str, str] = {
    "lora": f"lora({ADAPTED})",
    "lora, EVA": f"lora({ADAPTED}, init='eva')",
    "lora, LoRA-GA": f"lora({ADAPTED}, init='lora_ga')",
    "lora, LoRA+": f"lora({ADAPTED}, plus=4.0)",
    "lora, DoRA": f"lora({ADAPTED}, dora=True)",
    **{name: f"{name}({ADAPTED})" for name in (
        "allora", "ggpo", "gs-lora", "sora", "dylora", "increlora", "lora-sb", "triadapt",
        "cfsp-lora", "flexora", "diffora", "norms")},
    "nlora": f"nlora(lr=4e-4, {PACE})",  # its factors are a weight's own rows and columns
    **{name: f"{name}({WHOLE})" for name in ("full", "lisa", "owlore")},
    **{f"{name}, taught": f"{name}({rate})".replace("logits=0.0", "logits=1.0")
       for name, rate in (("lora", ADAPTED), ("full", WHOLE))},
    **{f"{name}, four tokens": f"{name}({rate}, ahead=4)"
       for name, rate in (("lora", ADAPTED), ("full", WHOLE))},
}
"""Row -> recovery; one rate for all that train adapters, but for one, and one for weights. All
learn from their own loss alone, but for those that are taught by the dense network beside it."""


def start(seed: int, windows: int) -> tuple[Any, list[dict[str, Any]], torch.Tensor]:
    """Return a trained model, batches of its training text, and text that it has not seen."""
    ids = small_text.windows()
    some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:windows]
    return small_text.trained(seed=seed), [
        {"input_ids": part, "use_cache": False} for part in ids[some].split(8)], \
        small_text.windows("held-out")[:64]


def cell(model: Any, batches: Sequence[dict[str, Any]], held: torch.Tensor, recovery: str,
         seed: int) -> tuple[float, float, str, str]:
    """Return the perplexity on unseen text, CPU seconds, what trained, and ranks if they vary."""
    begun = time.process_time()
    made = spacompiler.compile(
        model, batches[0], target="body=50%", importance="magnitude", allocation="uniform",
        repair="none", layout="any", onnx=False, latency=False, prove=False, quiet=True, seed=seed,
        recovery=recovery, recover_data=batches if recovery else None)
    spent, facts = time.process_time() - begun, made.job.trained or {}
    ranks = list(facts.get("ranks", {}).values())
    varies = f"{min(ranks)} to {max(ranks)}" if len(set(ranks)) > 1 else ""
    return perplexity(made.module, held), spent, str(facts.get("parameters", "")), varies


def main() -> None:
    """Print a table: a line for each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", help="pattern over rows")
    parser.add_argument("--seed", action="append", type=int)
    parser.add_argument("--windows", type=int, default=256)
    given = parser.parse_args()
    seeds = given.seed or [0, 1, 2]
    found = [start(seed, given.windows) for seed in seeds]
    dense = [perplexity(model, held) for model, _, held in found]
    print(f"seeds {', '.join(map(str, seeds))}; dense {mean(dense):.2f}\n\n"
          "| row | perplexity | spread | CPU s | trained | ranks |\n" + "|---" * 6 + "|",
          flush=True)
    for name, recovery in {"no recovery": "", **ROWS}.items():
        if given.only and not any(fnmatch.fnmatch(name, p) for p in given.only):
            continue
        cells = [cell(*one, recovery, seed) for one, seed in zip(found, seeds, strict=True)]
        values = [value for value, *_ in cells]
        spread = stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {mean(values):.2f} | {spread:.2f} | {mean(c[1] for c in cells):.1f} | "
              f"{cells[0][2]} | {cells[0][3]} |", flush=True)


if __name__ == "__main__":
    main()
