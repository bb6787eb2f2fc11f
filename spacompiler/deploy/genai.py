"""The file that onnxruntime-genai reads beside a decoder: `genai_config.json`.

It names one number of key/value heads and one head size for all layers, so models whose layers
differ have no such file; they run with :mod:`spacompiler.runtime` and any other loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from ..runtime.decoder import PAST, PRESENT, cache_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def genai_config(model: PreTrainedModel, path: Path) -> dict[str, Any] | None:
    """Return the configuration for a decoder file, or None where it has no word for the model.

    Sizes are those of the file's own inputs; the rest comes from the model's configuration.
    """
    graph = ir.load(path).graph
    inputs = {value.name: value.shape for value in graph.inputs}
    past = list(cache_names(inputs).values())  # type: ignore[arg-type]
    sizes = {(shape[1], shape[3]) for name in past if (shape := inputs[name]) is not None}
    if len(sizes) != 1:
        return None
    heads, dim = sizes.pop()
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or 2048
    fixed = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in inputs}
    names = {part: (PAST.format("%d", part), PRESENT.format("%d", part))
             for part in ("key", "value")}
    decoder = {
        "filename": path.name, "session_options": {"log_id": "onnxruntime-genai",
                                                   "provider_options": []},
        "hidden_size": config.hidden_size, "head_size": int(dim),  # type: ignore[arg-type]
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": int(heads),  # type: ignore[arg-type]
        "num_hidden_layers": len(past) // 2,
        "inputs": fixed | {f"past_{part}_names": name for part, (name, _) in names.items()},
        "outputs": {"logits": "logits"} | {
            f"present_{part}_names": name for part, (_, name) in names.items()}}
    return {"model": {"type": "decoder", "vocab_size": config.vocab_size,
                      "context_length": length, **_tokens(model), "decoder": decoder},
            "search": {"do_sample": False, "max_length": length, "num_beams": 1,
                       "past_present_share_buffer": False}}


def _tokens(model: PreTrainedModel) -> dict[str, Any]:
    """Special tokens; padding falls back on the end, as generation does."""
    said = [getattr(model, "generation_config", None), model.config]
    found = {key: next((v for s in said if (v := getattr(s, key, None)) is not None), None)
             for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = found["eos_token_id"]
    last = end[0] if isinstance(end, list) else end
    return {"bos_token_id": found["bos_token_id"] or 0, "eos_token_id": end if end else 0,
            "pad_token_id": found["pad_token_id"] if found["pad_token_id"] is not None
            else last or 0}
