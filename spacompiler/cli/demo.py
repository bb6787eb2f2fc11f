"""The main job on a real language model: compile, check, compare. Run by `make demo`.

Calibrates on three quarters of the text that every Python carries (`pydoc_data.topics`) and
measures perplexity on the rest.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..stages.records import Progress

MODEL, TARGET, OUT = "zoo:smollm2-135m", "body=75%", Path("out/demo")
SAMPLES = 48
"""Calibration windows: curvature fits more than the default's 16 hold."""
WINDOW, WINDOWS = 256, 24
PROMPT = "The Python programming language is"


def main() -> int:
    """Compile the model to OUT, print one table and a sentence from both models."""
    from .console import errors, progress

    with errors(False):
        out = _free(OUT)
        print(f"compiling {MODEL} to {TARGET} (the share of the body that stays); the first run "
              "downloads the model (93 MB)", file=sys.stderr, flush=True)
        started = time.monotonic()
        with progress() as tick:
            rows, sentences, data = _run(out, tick)
        _print(rows, sentences, data, out, time.monotonic() - started)
    return 0


def _free(out: Path) -> Path:
    """The first of out, out-2, out-3, … that does not exist: nothing is overwritten."""
    numbered = (out.with_name(f"{out.name}-{i}") for i in range(2, 1000))
    return out if not out.exists() else next(p for p in numbered if not p.exists())


def _run(out: Path, tick: Progress) -> tuple[list[tuple[str, ...]], list[str], dict[str, Any]]:
    from .. import api
    from ..artifact import report
    from ..evidence.calibration import python_text, windows
    from ..evidence.losses import perplexity
    from ..sources import named as source
    from ..torch_backend.own_layers import loads

    tick(f"loading {MODEL}", 0, 8)
    found = source.load(MODEL)
    result = api.compile(found.module, found.inputs, target=TARGET, out=out, name=MODEL,
                         importance="curvature", allocation="global", repair="refit",
                         layout="per-layer", samples=SAMPLES, tokenizer=found.tokenizer,
                         progress=tick)
    held_out = windows(found.tokenizer, python_text("held-out"), WINDOW)[:WINDOWS]
    scores, sentences = [], []
    for label, module in (("dense", found.module), ("pruned", result.module)):
        tick(f"perplexity of the {label} model on held-out text", 7, 8)
        scores.append(perplexity(module, held_out))
        tick(f"a sentence from the {label} model", 7, 8)
        sentences.append(f"{label}: {_sentence(module, found.tokenizer)}")
    sentences.append(f"{out}: {loads(type(result.module))}")
    rows = report.table_rows(result.report)
    rows.append(("perplexity on held-out text", f"{scores[0]:.2f}", f"{scores[1]:.2f}",
                 f"{scores[1] / scores[0]:.1%}"))
    return [tuple(row) for row in rows], sentences, result.report


def _sentence(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = module.generate(input_ids=ids, attention_mask=ids.new_ones(ids.shape),
                           max_new_tokens=24, do_sample=False, pad_token_id=0)
    return " ".join(tokenizer.decode(made[0], skip_special_tokens=True).split())


def _print(rows: list[tuple[str, ...]], sentences: list[str], data: dict[str, Any], out: Path,
           seconds: float) -> None:
    from rich.console import Console

    from .tables import table

    console = Console(soft_wrap=True)
    console.print(table(("", "dense", "pruned", "stays"), rows, f"{MODEL}: {TARGET}"))
    proof = data["proof"]
    console.print(f"proof: relative error {proof['relative_error']:.1e} in float64; a wrong index "
                  f"gives {proof['negative_control']:.1e}; reload {data['reload']}",
                  highlight=False)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"artifact: {out} (made in {seconds:.0f} s); check it again with "
                  f"`spacompiler verify {out}`", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
