"""Gemma 2: zero-centred norm gains before and after each block, soft-capped logits, tied head.

One layer attends through a sliding window shorter than the example sequence.
"""

from __future__ import annotations

from transformers import Gemma2Config

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        query_pre_attn_scalar=10,
        sliding_window=4,
        max_position_embeddings=32,
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
