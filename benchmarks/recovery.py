"""Which recovery gives most at equal tokens, on a language model: ours, LoRAPrune, others + LoRA.

    python benchmarks/recovery.py --data DIR --work DIR [--tokens 51200] [--rows ours+lora ...]
        [--model gemma3]

`--data` holds wikitext2/valid.txt (calibration and training; the last sixteenth of the windows is
held out) and wikitext2/test.raw, ptb/valid.txt (perplexity, windows of 512 tokens). All rows see
the same tokens, in batches of equal size. Each row's learning rate is the one of `--rates` that
does best on the held-out windows after a short run of `--sweep` tokens (rows that differ after a
comma share it); the texts that are measured take no part in that. Rows `+full` have one rate, 2e-4.
`--work` keeps the pruned models and the results, so that rows can be run one by one, and a training
that was stopped goes on; `--show` prints what is there. Of another model than SmolLM2-135M they lie
in a folder of its name in there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from language_models import MODELS
from rich.console import Console

import spacompiler
from spacompiler.cli.tables import table
from spacompiler.evidence.calibration import from_text, windows
from spacompiler.evidence.losses import default_loss, perplexity
from spacompiler.request import registry
from spacompiler.train.loop import Training

CALIBRATION = {"samples": 32, "length": 128, "batch": 4, "seed": 0}
COMMON = {"roles": ("channel",), "align": 1, "prove": False, "layout": "any", "onnx": False,
          "latency": False}
# how the model is pruned: name -> options of compile
BASES: dict[str, dict[str, Any]] = {
    "llm-pruner": {"importance": "taylor-element", "repair": "none"},
    "magnitude": {"importance": "magnitude", "repair": "none"},
    "wanda-sp": {"importance": "wanda", "repair": "none"},
    "flap": {"importance": "fluctuation", "repair": "bias"},
    "cfsp": {"importance": "cfsp", "allocation": "cfsp-layers", "repair": "none"},
    "adapt-pruner": {"importance": "taylor-element", "allocation": "adapt-layers",
                     "repair": "none"},
    "obs": {"importance": "obs(bias=False)", "repair": "refit(bias=False, damping=0.01)"},
    "refit": {"importance": "taylor-element", "repair": "refit"},  # the same slices, repaired
    "channels": {"importance": "curvature", "allocation": "global", "floor": 0.02,
                 "repair": "refit"},
    # heads too; slices are chosen on more of the tokens that are trained on, and what stays is
    # repaired beside text that the model writes on from them
    "ours": {"importance": "curvature(continued=False)", "allocation": "measured", "floor": 0.02,
             "repair": "refit(sequential=True, residual=True, every=True, create_biases=True)",
             "roles": ("channel", "head"), "samples": 128, "continued": True},
}
BASES["gates"] = {**BASES["ours"], "importance": "curvature", "allocation": "uniform",
                  "schedule": "gates(streams=True)"}
# what training starts from where the dense network teaches: the same slices, not repaired
BASES["curvature"] = {**BASES["channels"], "repair": "none", "roles": ("channel", "head")}
# as many tokens in windows as long as those that are measured; "beside" without measured moves,
# which give next to nothing at 65% and 80%
LONG = {"samples": 32, "length": 512, "batch": 2}
BASES["ours, long"] = {**BASES["ours"], **LONG}
BASES["beside, long"] = {**BASES["ours"], "importance": "curvature", "allocation": "global", **LONG}
BASES["ours, given text"] = {**BASES["ours"], "continued": False}
BASES["ours by layers"] = {**BASES["ours, given text"], "allocation": "cfsp-layers"}
STEP = "accumulate=1"
# rank 8, alpha 16, dropout 0.05 on every linear layer of a block, as LLM-Pruner released it
RELEASED = f"lora(lr={{lr}}, dropout=0.05, norms=False, logits=0.0, evaluations=4, {STEP})"
OWN = f"lora(lr={{lr}}, logits=0.0, evaluations=4, {STEP})"
FULL = f"full(lr=2e-4, evaluations=5, {STEP})"  # the own loss and the divergence
# row -> (how it was pruned, pass that trains; "" for none). A base "lora-prune" is pruned by it.
ROWS: dict[str, tuple[str, str]] = {
    "llm-pruner": ("llm-pruner", ""),
    "llm-pruner+lora": ("llm-pruner", RELEASED),
    "lora-prune": ("lora-prune", f"lora-prune(epochs=1, lr={{lr}}, {STEP})"),
    **{f"{base}+lora": (base, RELEASED)
       for base in ("magnitude", "wanda-sp", "flap", "cfsp", "adapt-pruner", "obs")},
    "refit": ("refit", ""), "refit+lora": ("refit", OWN),
    "channels": ("channels", ""), "channels+lora": ("channels", OWN),
    "ours": ("ours", ""), "ours+lora": ("ours", OWN),
    "ours+lora, KL": ("ours", OWN.replace("logits=0.0", "task=0.0, logits=1.0")),
    "ours+lora, both": ("ours", OWN.replace("logits=0.0", "logits=1.0")),
    "ours, given text": ("ours, given text", ""),
    "ours, given text+lora": ("ours, given text", OWN),
    "ours by layers+lora": ("ours by layers", OWN),
    "ours+norms": ("ours", f"norms(lr={{lr}}, logits=0.0, {STEP})"),
    "gates": ("gates", ""), "curvature": ("curvature", ""),
    "ours, long": ("ours, long", ""), "beside, long": ("beside, long", ""),
    **{f"{base}+full": (base, FULL)
       for base in ("cfsp", "curvature", "ours", "gates", "ours, long", "beside, long")},
    **{f"{base}+full, 1e-4": (base, FULL.replace("2e-4", "1e-4"))
       for base in ("cfsp", "beside, long")},
    "ours+full, 4e-4": ("ours", FULL.replace("2e-4", "4e-4")),
    "gates+full, own loss": ("gates", FULL.replace("lr=2e-4", "lr=2e-4, logits=0.0")),
}
RIVALS = ("llm-pruner+lora", "lora-prune")
RATES = (1e-3, 2e-3, 4e-3)


def pruned(base: str, args: argparse.Namespace) -> Any:
    """Return the pruned model, from the work directory if it is there."""
    folder = args.work / f"{base}-{args.target.replace('=', '').strip('%')}"
    if not folder.exists():
        result = spacompiler.compile(
            MODELS[args.model].source, target=args.target,
            calibration=str(args.data / "wikitext2" / "valid.txt"), out=folder,
            work=args.work / f"{folder.name}.work", **{**COMMON, **CALIBRATION, **BASES[base]})
        print(base, result.plan.costs["body"], result.job.notes, flush=True)
    return spacompiler.load(folder)


def scores(module: Any, tokenizer: Any, data: Path, count: int) -> dict[str, float]:
    """Return the perplexity on both texts, windows of 512 tokens."""
    texts = {"wikitext2": data / "wikitext2" / "test.raw", "ptb": data / "ptb" / "valid.txt"}
    return {name: perplexity(module, windows(tokenizer, path.read_text(encoding="utf-8"),
                                             512)[:count], batch=1)
            for name, path in texts.items()}


def run(row: str, recipe: str, tokens: int, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Prune and train one row; CPU seconds are those of the training (and of LoRAPrune's masks).

    Returns what happened and the module.
    """
    base, _ = ROWS[row]
    dense = MODELS[args.model].load()
    text = str(args.data / "wikitext2" / "valid.txt")
    data = from_text(text, dense.tokenizer, samples=tokens * 16 // 15 // args.length,
                     length=args.length, batch=2, seed=1)
    calls = [((), {**kwargs, "use_cache": False}) for _, kwargs in data.batches]
    held_out = max(1, len(calls) // 16)
    place = args.work / f"{row} {args.target} {tokens} {recipe}".replace("/", "")
    before = json.loads(spent.read_text()) if (spent := place / "spent.json").exists() else 0.0
    started = time.process_time() - before
    progress = partial(_tell, time.monotonic(), spent, started)
    torch.manual_seed(0)
    if base == "lora-prune":
        module = spacompiler.compile(
            MODELS[args.model].source, target=args.target, schedule=recipe,
            calibration=calls[:-held_out], progress=progress, **COMMON).module
        seen = sum(k["input_ids"].numel() for _, k in calls[:-held_out])
    else:
        module = pruned(base, args)
        if "logits=0.0" in recipe or not recipe:
            dense.module = torch.nn.Identity()  # it is not needed: give its memory back
        started, seen = time.process_time() - before, 0
        progress = partial(_tell, time.monotonic(), spent, started)
        if recipe:
            seen = registry.find("recovery", recipe).run(Training(
                module, dense.module, calls[:-held_out], calls[-held_out:], default_loss,
                progress=progress, checkpoint=place, key=recipe))["amount"]
            shutil.rmtree(place, ignore_errors=True)
    found = {"row": row, "recipe": recipe or "no training", "tokens": seen,
             "cpu_s": round(time.process_time() - started),
             "parameters": sum(p.numel() for p in module.parameters())}
    return found | {"held_out": held_out_loss(module.eval(), calls[-held_out:])}, module


def _tell(started: float, spent: Path, cpu: float, stage: str, done: int, total: int) -> None:
    """Say how far a training is, and keep what it took so far beside its checkpoint."""
    if spent.parent.exists():
        spent.write_text(json.dumps(time.process_time() - cpu))
    if total and done % max(1, total // 8) == 0:
        print(f"{time.monotonic() - started:6.0f} s", stage, f"{done}/{total}", flush=True)


@torch.no_grad()
def held_out_loss(module: Any, calls: list[Any]) -> float:
    """Return the mean next-token loss on the held-out windows."""
    return sum(default_loss([module(**k).logits], a, k).item() for a, k in calls) / len(calls)


def best_rate(row: str, args: argparse.Namespace, book: Path) -> float:
    """Return the rate with the lowest held-out loss after a short run; kept in the work folder."""
    kept = json.loads(book.read_text()) if book.exists() else {}
    row = row.partition(",")[0]
    for rate in args.rates:
        key = f"{row} {rate:g} {args.sweep}"
        if key not in kept:
            found, _ = run(row, ROWS[row][1].format(lr=rate), args.sweep, args)
            kept[key] = found["held_out"]
            book.write_text(json.dumps(kept, indent=1))
            print(key, found, flush=True)
    return min(args.rates, key=lambda r: kept[f"{row} {r:g} {args.sweep}"])


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the table: tuned if it trains, then run and measured on both texts."""
    recipe = ROWS[row][1]
    rate = best_rate(row, args, args.work / "rates.json") if "{lr}" in recipe else 0.0
    found, module = run(row, recipe.format(lr=rate), args.tokens, args)
    tokenizer = MODELS[args.model].load().tokenizer
    return {**found, "rate": rate, **scores(module, tokenizer, args.data, args.windows)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows measured so far, with ratios to LLM-Pruner + LoRA and to LoRAPrune."""
    def against(row: dict[str, Any], rival: str) -> str:
        other = next((r for r in rows if r["row"] == rival), None)
        return "" if other is None else " / ".join(
            f"{row[text] / other[text]:.2f}" for text in ("wikitext2", "ptb"))

    Console(width=150).print(table(
        ("row", "rate", "tokens", "CPU s", "body left", "held-out loss", "WikiText-2", "PTB",
         *(f"against {rival}" for rival in RIVALS)),
        [(r["row"], f"{r['rate']:g}" if r["rate"] else "", f"{r['tokens']:,}",
          str(r["cpu_s"]) if r["tokens"] else "", f"{r['parameters'] / 1e6:.1f}M",
          f"{r['held_out']:.3f}", f"{r['wikitext2']:.1f}",
          f"{r['ptb']:.1f}", *(against(r, rival) for rival in RIVALS)) for r in rows]))


def main() -> None:
    """Measure rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--target", default="body=50%")
    parser.add_argument("--tokens", type=int, default=51200)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--sweep", type=int, default=4096)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--show", action="store_true", help="print what the work folder holds")
    args = parser.parse_args()
    if args.model != "smollm2":
        args.work /= args.model  # nothing that is kept serves another model
    args.work.mkdir(parents=True, exist_ok=True)
    book = args.work / "rows.json"
    for row in () if args.show else args.rows:
        made = measure(row, args)
        rows = json.loads(book.read_text()) if book.exists() else []
        rows = [r for r in rows if r["row"] != row] + [made]
        book.write_text(json.dumps(rows, indent=1))
        print(json.dumps(made), flush=True)
    found = {r["row"]: r for r in json.loads(book.read_text())}
    show([found[row] for row in ROWS if row in found])


if __name__ == "__main__":
    main()
