"""Hold a runtime's tokens against torch's, where that runtime is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ProofError
from ..torch_backend.kinds import is_encoder_decoder, writes_text
from .runners import RUNNERS

TOKENS, PROMPT = 16, 6
AGREE = 0.9
"""Share of tokens that must agree: kernels of other runtimes round otherwise, and ties fall so."""


def run_in(name: str, folder: Path, model: nn.Module, *, exact: bool = True) -> dict[str, Any]:
    """Return how many of torch's greedy tokens a runtime writes, each after torch's before it.

    Nothing is run for models that write no text, or by runtimes that Python cannot call;
    `missing` names the package of one that is not installed. Quantised files (not `exact`) only
    have to run.

    Raises:
        ProofError: it does not load there, or writes other tokens.
    """
    if name not in RUNNERS or not writes_text(model) or is_encoder_decoder(model):
        return {}
    package = RUNNERS[name].package
    if find_spec(package) is None:
        return {"missing": package}
    texts, want = _greedy(model)
    got = _ask(name, folder, texts)
    same = sum(a == b for a, b in zip(got, want, strict=True))
    if exact and same < AGREE * len(want):
        raise ProofError(f"{name} writes other tokens than torch", where=str(folder.name),
                         why=f"{same} of {len(want)} agree", fix="please report it")
    return {"same": same, "tokens": len(want)}


def _greedy(model: nn.Module) -> tuple[list[list[int]], list[int]]:
    """Texts of growing length, and the token that torch writes after each."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    ids = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    texts, want = [], []
    with torch.no_grad():
        for _ in range(TOKENS):
            texts.append(ids[0].tolist())
            best = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            want.append(int(best))
            ids = torch.cat([ids, best], dim=1)
    return texts, want


def _ask(name: str, folder: Path, texts: list[list[int]]) -> list[int]:
    code = [sys.executable, "-m", f"{__package__}.runners", name, str(folder)]
    done = subprocess.run(code, input=json.dumps(texts), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ProofError(f"{name} does not run what was written", where=str(folder.name),
                         why=said[-1][:300], fix="please report it")
    found: list[int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
