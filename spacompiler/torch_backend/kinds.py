"""Kinds of modules, asked of in one place."""

from __future__ import annotations

from torch import nn


def is_hf(module: nn.Module) -> bool:
    """True for a transformers model (without importing transformers)."""
    return hasattr(module, "save_pretrained") and hasattr(module, "config") and \
        hasattr(type(module), "config_class")


def is_encoder_decoder(module: nn.Module) -> bool:
    """True if what a language model writes is another sequence than what it is given."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
