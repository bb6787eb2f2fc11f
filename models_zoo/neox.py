"""GPT-NeoX: qkv fused per head, rotary on part of each head, attention and MLP in parallel."""

from __future__ import annotations

from transformers import GPTNeoXConfig

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=32,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
