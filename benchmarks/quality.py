"""Perplexity of one language model pruned without training, by every method on one protocol.

    python benchmarks/quality.py --data DIR --json quality.json --picture quality.png
    python benchmarks/quality.py --data DIR --model gemma3 --samples 16 --share 75% --only default

DIR holds wikitext2/valid.txt (calibration), wikitext2/test.raw and ptb/valid.txt (evaluation);
without it, text that Python carries stands in for all three. All rows see the same calibration
windows; what their criteria need of them is gathered in one pass. Done cells are kept in the
JSON file, so that a run can be cut short and taken up again; `--only` names rows, `--also
file.py:Class` adds a row for a criterion of one's own.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from language_models import MODELS
from quality_bench import Bench, gather, once
from quality_cells import run
from quality_drawing import picture, table
from quality_rows import METHODS, own

from spacompiler.evidence.calibration import python_text, windows
from spacompiler.evidence.prototypes import CHOICES, by_prototype
from spacompiler.trials import measure as measurements

SHARES = ("80%", "65%", "50%")
LENGTH = 512
CALIBRATION = "wikitext2/valid.txt"


def texts(tokenizer: Any, data: Path | None, count: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return calibration windows, and the first `count` windows of each evaluation text."""
    if data is None:
        held_out = windows(tokenizer, python_text("held-out"), LENGTH)[:count]
        return windows(tokenizer, python_text(), LENGTH), {"Python": held_out}
    read = {name: windows(tokenizer, (data / path).read_text(encoding="utf-8"), LENGTH)
            for name, path in (("valid", CALIBRATION), ("WikiText-2",
                               "wikitext2/test.raw"), ("PTB", "ptb/valid.txt"))}
    return read.pop("valid"), {name: ids[:count] for name, ids in read.items()}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="smollm2")
    parser.add_argument("--data", type=Path, help="folder with wikitext2/ and ptb/")
    parser.add_argument("--json", type=Path, help="results so far; default: quality.json, of "
                                                  "another model than smollm2 quality-MODEL.json")
    parser.add_argument("--only", action="append", default=[], help="pattern over rows")
    parser.add_argument("--also", action="append", default=[], help="file.py:Criterion")
    parser.add_argument("--share", action="append", default=[], help="80%%, 65%%, 50%%")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--samples", type=int, default=48, help="calibration windows")
    parser.add_argument("--windows", type=int, default=6, help="evaluation windows per text")
    parser.add_argument("--choice", choices=CHOICES, default="random", help="of those windows")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    given = arguments(argv)
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    model = MODELS[given.model]
    given.json = given.json or Path(
        "quality.json" if given.model == "smollm2" else f"quality-{given.model}.json")
    found = model.load()
    module, inputs, tokenizer = found.module, found.inputs, found.tokenizer
    ids, evaluated = texts(tokenizer, given.data, given.windows)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(given.seed)) \
        if given.choice == "random" else by_prototype(
            module.get_input_embeddings().weight.detach(), given.choice, given.seed)(ids)
    bench = Bench(model, module, inputs, tokenizer, ids[order[: given.samples]], evaluated,
                  given.json, given.seed, given.data and given.data / CALIBRATION)
    bench.done = json.loads(given.json.read_text()) if given.json.exists() else {}
    protocol = {"model": model.title, "window": LENGTH, "seed": given.seed,
                "calibration_windows": given.samples, "threads": torch.get_num_threads(),
                "evaluated": {name: len(rows) for name, rows in evaluated.items()}}
    if given.choice != "random":
        protocol["choice"] = given.choice
    if bench.done.setdefault("protocol", protocol) != protocol:
        raise SystemExit(f"{given.json} was made by another protocol; give another --json")
    methods = {**METHODS, **dict(own(text) for text in given.also)}
    if given.only:
        methods = {n: m for n, m in methods.items()
                   if any(fnmatch.fnmatch(n, p) for p in given.only) or n in [
                       t.rpartition(":")[2] for t in given.also]}
    shares = given.share or SHARES
    bench.analyse()
    measurements.angles = once(measurements.angles)
    gather(bench, methods)
    run(bench, methods, shares)
    print(table(bench.done, shares))
    if given.picture:
        picture(bench.done, given.picture)


if __name__ == "__main__":
    main()
