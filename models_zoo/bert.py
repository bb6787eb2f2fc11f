"""BERT: post-norm encoder, three summed embeddings, and a tied decoder with a bias of its own."""

from __future__ import annotations

import torch
from transformers import AutoModelForMaskedLM, BertConfig

from spacompiler.models_zoo._seeded import seeded, tokens
from spacompiler.models_zoo._tiny_transformers import (
    INITIALIZER_RANGE,
    VOCABULARY,
    Built,
    from_config,
)


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs; the second row ends in padding."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=INITIALIZER_RANGE,
    )
    with seeded(seed):
        model = from_config(AutoModelForMaskedLM, config)
        ids = tokens(VOCABULARY)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}
