"""ViT: patch convolution, class token and learned positions that share the residual width."""

from __future__ import annotations

from transformers import ViTConfig

from spacompiler.models_zoo._tiny_transformers import INITIALIZER_RANGE, Built, image_classifier


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        initializer_range=INITIALIZER_RANGE,
    )
    return image_classifier(config, seed)
