"""GPT-2: one fused, transposed (Conv1D) qkv weight, learned positions and a tied output head."""

from __future__ import annotations

from transformers import GPT2Config

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=40,
        n_layer=2,
        n_head=5,
        n_inner=56,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
