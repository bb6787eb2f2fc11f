"""Shared building of the tiny `transformers` models from their configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PreTrainedConfig,
)

from spacompiler.models_zoo._seeded import images, randomise, seeded, tokens

VOCABULARY = 61
LABELS = 7
# The usual 0.02 would leave every block a negligible addition to the residual stream.
INITIALIZER_RANGE = 0.2

Built = tuple[nn.Module, dict[str, torch.Tensor]]


def from_config(auto_class: Any, config: PreTrainedConfig) -> nn.Module:
    """A float32 model with no cache and no constant parameters (call it inside `seeded`)."""
    config.use_cache = False
    model: nn.Module = auto_class.from_config(config, dtype=torch.float32)
    return randomise(model)


def causal_lm(config: PreTrainedConfig, seed: int) -> Built:
    """A causal language model and two rows of tokens."""
    with seeded(seed):
        model = from_config(AutoModelForCausalLM, config)
        return model, {"input_ids": tokens(VOCABULARY)}


def image_classifier(config: PreTrainedConfig, seed: int) -> Built:
    """An image classifier and two images."""
    config.num_labels = LABELS
    with seeded(seed):
        model = from_config(AutoModelForImageClassification, config)
        return model, {"pixel_values": images()}
