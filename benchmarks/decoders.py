"""Language models of many types as a decoder with its cache: is what model.onnx writes torch's?

    python benchmarks/decoders.py [TYPE ...]

Tiny random models, each exported, and run token by token with its own cache, in one row and in
three of which one is padded; a row of the table is a type.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import transformers
from tiny_transformers import FAMILIES, MODELS

from spacompiler.deploy.decoder import check_causal_lm, export_decoder
from spacompiler.deploy.decoder_parity import decoder_parity
from spacompiler.errors import SpaError
from spacompiler.stages.tolerances import ONNX

TYPES = [kind for family in FAMILIES if family.cls == "AutoModelForCausalLM"
         for kind in family.rows]


def outcome(kind: str) -> str:
    """The cells of a type: tokens, and the largest difference of logits or why there are none."""
    try:
        model, _ = MODELS[kind]()
        with tempfile.TemporaryDirectory() as place:
            check_causal_lm(model)
            export_decoder(model, Path(place) / "model.onnx")
            checks = decoder_parity(model, Path(place) / "model.onnx")
    except SpaError as problem:
        return f"| refused: {' '.join(problem.why.split())[:160]}"
    except Exception as problem:  # any class may run here
        return f"| **{type(problem).__name__}: {' '.join(str(problem).split())[:160]}**"
    same, tokens = (sum(getattr(c, n) for c in checks) for n in ("same", "tokens"))
    worst = max(c.max_rel for c in checks)
    return f"{same} of {tokens} | {worst:.0e}" + ("" if worst <= ONNX.value else " **wrong**")


def main() -> None:
    """Print a row for each type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| type | tokens that are torch's | largest difference of logits |\n|---|---|---|")
    for kind in sys.argv[1:] or TYPES:
        print(f"| {kind} | {outcome(kind)} |", flush=True)


if __name__ == "__main__":
    main()
