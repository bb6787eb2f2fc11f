"""ConvNeXt: depthwise convolutions, channels-last MLPs between permutes, and layer scale."""

from __future__ import annotations

from transformers import ConvNextConfig

from spacompiler.models_zoo._tiny_transformers import INITIALIZER_RANGE, Built, image_classifier


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = ConvNextConfig(
        image_size=32,
        hidden_sizes=[12, 20, 28, 36],
        depths=[1, 2, 1, 1],
        initializer_range=INITIALIZER_RANGE,
    )
    return image_classifier(config, seed)
