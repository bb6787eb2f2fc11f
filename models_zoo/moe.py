"""Mixtral: a router and stacked expert weights, where one channel is a slice of every expert.

The default experts implementation (`grouped_mm`) is exported: on a CPU it is the custom operator
`transformers::grouped_mm_fallback`.  `batched_mm` exports to plain `bmm`; `eager` does not export.
"""

from __future__ import annotations

from transformers import MixtralConfig

from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    causal_lm,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=28,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        initializer_range=INITIALIZER_RANGE,
    )
    return causal_lm(config, seed)
