"""Qwen3: per-head query and key norms, and heads that together are wider than the hidden size."""

from __future__ import annotations

from transformers import Qwen3Config

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
