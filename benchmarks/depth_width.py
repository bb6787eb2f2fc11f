"""Blocks or widths: perplexity and latency of SmolLM2-135M at one size, without so many blocks.

    python benchmarks/depth_width.py --data DIR [--target body=80%] [--blocks 0 2 4 6]

`--data` holds wikitext2/valid.txt (calibration: 16 windows of 128 tokens) and wikitext2/test.raw,
ptb/valid.txt (perplexity over the first windows of 512 tokens). Slices are chosen by `taylor`, all
layers alike, and what stays is refit. Latency is that of ONNX Runtime, one thread, 128 tokens,
dense and pruned in turn in one process; its ratio is what counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import spacompiler
from spacompiler.evidence.calibration import windows
from spacompiler.evidence.losses import perplexity

MODEL = "zoo:smollm2-135m"


def row(blocks: int, args: argparse.Namespace) -> str:
    """Compile without so many blocks and return a row of the table."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = spacompiler.compile(
            MODEL, target=args.target, blocks=str(blocks) if blocks else "", align=1,
            calibration=str(args.data / "wikitext2" / "valid.txt"), importance="taylor",
            out=Path(folder) / "out")
    seconds = time.process_time() - started
    times, body = result.report["latency"], result.plan.costs["body"]
    texts = (args.data / "wikitext2" / "test.raw", args.data / "ptb" / "valid.txt")
    found = [perplexity(result.module, windows(result.job.tokenizer, text.read_text(
        encoding="utf-8"), 512)[:args.windows], batch=1) for text in texts]
    gone = [path.rpartition(".")[2] for path in result.job.dropped.paths] if blocks else []
    return (f"| {blocks} | {', '.join(gone) or '-'} | {body['pruned'] / body['dense']:.1%} "
            f"| {found[0]:.1f} | {found[1]:.1f} "
            f"| {times['pruned']['median_ms'] / times['dense']['median_ms']:.3f} "
            f"| {seconds:.0f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="body=80%")
    parser.add_argument("--blocks", type=int, nargs="*", default=[0, 2, 4, 6])
    parser.add_argument("--windows", type=int, default=6)
    args = parser.parse_args()
    print(f"{json.dumps(args.target)}\n\n| blocks dropped | which | body | WikiText-2 | PTB "
          "| latency, of dense | CPU s |\n|---|---|---|---|---|---|---|")
    for blocks in args.blocks:
        print(row(blocks, args), flush=True)


if __name__ == "__main__":
    main()
