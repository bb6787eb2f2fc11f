"""Llama with two key/value heads for six query heads: pruning a head must keep the groups.

RMSNorm, rotary positions, a SwiGLU MLP and an output head that is not tied.
"""

from __future__ import annotations

from transformers import LlamaConfig

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
