"""GGUF files of published models, made transformers directories in float32."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from spacompiler.system.process import no_progress_bars


def convert(source: Path, target: Path) -> None:
    """Read a GGUF file, and write a float32 transformers directory (network and tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        model, found = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
        )
        check_whole(found)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        _forget_origin(model, tokenizer)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def check_whole(found: Mapping[str, Collection[object]]) -> None:
    """Raise RuntimeError where arrays were missing, left over or of other shapes.

    What is missing is initialised at random, and would be kept in the cache like that.
    """
    wrong = [f"{kind}: {', '.join(sorted(map(str, what))[:8])}" for kind, what in found.items()
             if what]
    if wrong:
        raise RuntimeError("the published weights are not the network's; " + "; ".join(wrong))


def _forget_origin(model: Any, tokenizer: Any) -> None:
    """Make it an ordinary float model: no trace of the quantiser or of the scratch directory."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.config._name_or_path = ""
    model.name_or_path = ""
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars; the one of the GGUF reader knows no setting, so stderr goes as well."""
    with no_progress_bars(), redirect_stderr(io.StringIO()):
        yield
