"""Encoder-decoders of several types as encoder.onnx and decoder.onnx: is what they write torch's?

    python benchmarks/pairs.py [TYPE ...]

Tiny random models, written and run token by token with both caches, in one row and in three rows
of which one is padded; a row of the table is a type.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from spacompiler.deploy.encoder_decoder import export_pair, pair_parity
from spacompiler.errors import SpaError

TEXT = {"vocab_size": 40, "d_model": 16, "decoder_start_token_id": 0, "eos_token_id": 1}
SIDES = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}
BLOCKS = {**TEXT, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
PLACED = {**TEXT, **SIDES, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
          "eos_token_id": 2, "forced_eos_token_id": 2}
SOUND = {**TEXT, **SIDES, "pad_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 3}
MODELS: dict[str, dict[str, Any]] = {
    "T5": BLOCKS, "MT5": BLOCKS, "UMT5": BLOCKS,
    "LongT5": {**BLOCKS, "local_radius": 3, "global_block_size": 4},
    "SwitchTransformers": {**BLOCKS, "num_experts": 2, "num_decoder_layers": 2},
    "Bart": PLACED, "MBart": PLACED, "PLBart": PLACED, "M2M100": PLACED, "Pegasus": PLACED,
    "Blenderbot": PLACED, "BlenderbotSmall": PLACED,
    "Marian": {**TEXT, **SIDES, "max_position_embeddings": 64, "pad_token_id": 1,
               "decoder_start_token_id": 1},
    "LED": {**PLACED, "max_encoder_position_embeddings": 64, "attention_window": 4,
            "max_decoder_position_embeddings": 64},
    "ProphetNet": {"vocab_size": 40, "hidden_size": 16, "num_encoder_layers": 1,
                   "num_decoder_layers": 2, "num_encoder_attention_heads": 2,
                   "num_decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
                   "max_position_embeddings": 64, "decoder_start_token_id": 0},
    "Whisper": {**SOUND, "num_mel_bins": 8, "max_source_positions": 10,
                "max_target_positions": 24},
    "Speech2Text": {**SOUND, "input_feat_per_channel": 8, "max_source_positions": 64,
                    "max_target_positions": 24, "conv_channels": 16, "conv_kernel_sizes": (3, 3)},
    "Moonshine": {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20,
                  "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 2,
                  "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
                  "max_position_embeddings": 64, "pad_token_id": 2, "decoder_start_token_id": 1}}
NAMES = {"Marian": "MarianMTModel"}


def built(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of random numbers, and example inputs."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    model = getattr(transformers, NAMES.get(name, f"{name}ForConditionalGeneration"))(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval(), {"input_ids": torch.ones(2, 5, dtype=torch.long),
                          "input_features": torch.randn(
                              (1, 20, 8) if name == "Speech2Text" else (1, 8, 20)),
                          "input_values": torch.randn(1, 6000)}


def main() -> None:
    """Print a row for each type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print("| type | tokens that are torch's | largest difference of logits |\n|---|---|---|")
    for name in sys.argv[1:] or MODELS:
        model, example = built(name)
        with tempfile.TemporaryDirectory() as place:
            try:
                export_pair(model, example, Path(place))
                checks = pair_parity(model, example, Path(place))
            except SpaError as problem:
                print(f"| {name} | {' '.join(str(problem).split())[:160]} | |", flush=True)
                continue
        same, tokens = (sum(getattr(c, n) for c in checks) for n in ("same", "tokens"))
        print(f"| {name} | {same} of {tokens} | {max(c.max_rel for c in checks):.0e} |", flush=True)


if __name__ == "__main__":
    main()
