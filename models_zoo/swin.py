"""Swin: shifted windows, a bias table per head, and patch merging (a concat of four slices)."""

from __future__ import annotations

from transformers import SwinConfig

from spacompiler.models_zoo._tiny_transformers import INITIALIZER_RANGE, Built, image_classifier


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=20,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=1.5,
        initializer_range=INITIALIZER_RANGE,
    )
    return image_classifier(config, seed)
