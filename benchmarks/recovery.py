"""Which recovery gives most at equal tokens: LLM-Pruner + LoRA against ours, on SmolLM2-135M.

    python benchmarks/recovery.py --data DIR --work DIR [--tokens 4096] [--rows refit+lora ...]

`--data` holds wikitext2/valid.txt (calibration and training; the last sixteenth of the windows is
held out) and wikitext2/test.raw, ptb/valid.txt (perplexity, windows of 512 tokens). `--work` keeps
the pruned models and the results, so that rows can be run one by one. All rows see the same tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import spacompiler
from spacompiler import registry, source
from spacompiler.calibration import default_loss, from_text, perplexity, windows
from spacompiler.report_tables import table
from spacompiler.training import Training

MODEL = "zoo:smollm2-135m"
CALIBRATION = {"samples": 32, "length": 128, "batch": 4, "seed": 0}
COMMON = {"roles": ("channel",), "align": 1, "prove": False, "layout": "any", **CALIBRATION}
# how the model is pruned: name -> options of compile
BASES: dict[str, dict[str, Any]] = {
    "llm-pruner": {"importance": "taylor-element", "repair": "none"},
    "refit": {"importance": "taylor-element", "repair": "refit"},  # the same slices, repaired
    "ours": {"importance": "curvature", "allocation": "global", "floor": 0.02,
             "repair": "refit"},
}
STEP = "accumulate=2, evaluations=2"
# r 8, alpha 16, dropout 0.05, as LLM-Pruner released it; its learning rate is 1e-4
RELEASED = "lora(lr={}, dropout=0.05, norms=False, " + STEP + ")"
# row -> (how it was pruned, recovery pass or "" for none)
ROWS: dict[str, tuple[str, str]] = {
    "llm-pruner": ("llm-pruner", ""),
    "llm-pruner+lora": ("llm-pruner", RELEASED.format("1e-4")),
    "llm-pruner+lora, our rate": ("llm-pruner", RELEASED.format("2e-3")),
    **{f"{base}{name}": (base, recipe) for base in ("refit", "ours") for name, recipe in {
        "": "", "+lora": f"lora(lr=2e-3, {STEP})",
        "+lora, KL": f"lora(lr=2e-3, task=0.0, logits=1.0, {STEP})",
        "+full": f"full(lr=3e-4, {STEP})", "+norms": f"norms(lr=5e-3, {STEP})"}.items()},
}


def pruned(base: str, target: str, data: Path, work: Path) -> Any:
    """Return the pruned model, from the work directory if it is there."""
    folder = work / f"{base}-{target.replace('=', '').strip('%')}"
    if not folder.exists():
        result = spacompiler.compile(
            MODEL, target=target, calibration=str(data / "wikitext2" / "valid.txt"), out=folder,
            onnx=False, latency=False, **COMMON, **BASES[base])
        print(base, result.plan.costs["body"], result.job.notes, flush=True)
    return spacompiler.load(folder)


def scores(module: Any, tokenizer: Any, data: Path, count: int) -> dict[str, float]:
    """Return the perplexity on both texts, windows of 512 tokens."""
    texts = {"wikitext2": data / "wikitext2" / "test.raw", "ptb": data / "ptb" / "valid.txt"}
    return {name: perplexity(module, windows(tokenizer, path.read_text(encoding="utf-8"),
                                             512)[:count], batch=1)
            for name, path in texts.items()}


def run(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune, train and measure one row; CPU seconds are those of the training alone."""
    base, recipe = ROWS[row]
    dense = source.load(MODEL)
    module = pruned(base, args.target, args.data, args.work)
    found: dict[str, Any] = {"row": row, "recipe": recipe or "no training", "tokens": 0,
                             "parameters": sum(p.numel() for p in module.parameters())}
    if recipe:
        data = from_text(str(args.data / "wikitext2" / "valid.txt"), dense.tokenizer,
                         samples=args.tokens * 16 // 15 // args.length, length=args.length,
                         batch=1, seed=1)
        calls = [((), {**kwargs, "use_cache": False}) for _, kwargs in data.batches]
        held_out = max(1, len(calls) // 16)
        if "logits" not in recipe:
            dense.module = torch.nn.Identity()  # it is not needed: give its memory back
        started = time.process_time()
        torch.manual_seed(0)
        facts = registry.find("recovery", recipe).run(Training(
            module, dense.module,
            calls[:-held_out], calls[-held_out:], default_loss,
            progress=lambda stage, done, total: print(stage, f"{done}/{total}", flush=True)))
        found |= {"tokens": facts["amount"], "cpu_s": round(time.process_time() - started),
                  "held_out": [round(h["loss"], 3) for h in facts["history"]],
                  "best_step": facts["best_step"]}
    return {**found, **scores(module.eval(), dense.tokenizer, args.data, args.windows)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows measured so far, with ratios to the best LLM-Pruner + LoRA."""
    rivals = [r["wikitext2"] for r in rows if r["row"].startswith("llm-pruner+")]
    best = min(rivals, default=float("nan"))
    Console(width=150).print(table(
        ("row", "recipe", "tokens", "CPU s", "WikiText-2", "PTB", "against LLM-Pruner + LoRA"),
        [(r["row"], r["recipe"], f"{r['tokens']:,}", str(r.get("cpu_s", "")),
          f"{r['wikitext2']:.1f}", f"{r['ptb']:.1f}", f"{r['wikitext2'] / best:.2f}")
         for r in rows]))


def main() -> None:
    """Measure rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--target", default="body=50%")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    book = args.work / "rows.json"
    rows = json.loads(book.read_text()) if book.exists() else []
    for row in args.rows:
        made = run(row, args)
        rows = [r for r in rows if r["row"] != row or r["tokens"] != made["tokens"]] + [made]
        book.write_text(json.dumps(rows, indent=1))
        print(json.dumps(made), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
