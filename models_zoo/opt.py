"""OPT: biases everywhere, ReLU, and embeddings narrower than the hidden size (projected)."""

from __future__ import annotations

from transformers import OPTConfig

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        word_embed_proj_dim=28,
        ffn_dim=56,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=32,
        init_std=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
