"""Kinds of modules, asked of in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn


class Config(Protocol):
    """A configuration of transformers: entries as attributes, and all of them as plain data."""

    bos_token_id: int | None
    quantization_config: object

    def to_dict(self) -> dict[str, Any]:
        """Return the entries by name."""


class Tokenizer(Protocol):
    """What of a tokenizer of transformers is used beside its call."""

    bos_token_id: int | None
    eos_token_id: int | None

    def save_pretrained(self, folder: str | Path) -> object:
        """Write its files into a folder."""


class StockModel(nn.Module):
    """What a transformers model has beside a module. For annotations: no model is made of it."""

    config: Config
    generation_config: object
    dtype: torch.dtype
    generate: Callable[..., torch.Tensor]
    tie_weights: Callable[[], None]
    save_pretrained: Callable[..., object]
    dequantize: Callable[[], nn.Module]


def is_hf(module: nn.Module) -> TypeGuard[StockModel]:
    """True for a transformers model (without importing transformers)."""
    return hasattr(module, "save_pretrained") and hasattr(module, "config") and \
        hasattr(type(module), "config_class")


def writes_text(module: nn.Module) -> TypeGuard[StockModel]:
    """True for a module that goes on with token ids by itself, as transformers' models do."""
    return callable(getattr(module, "generate", None))


def is_encoder_decoder(module: nn.Module) -> bool:
    """True if what a language model writes is another sequence than what it is given."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
