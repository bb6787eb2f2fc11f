"""Inputs of a network as calls, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Batch = tuple[tuple[Any, ...], dict[str, Any]]


Inputs = tuple[Any, ...] | dict[str, Any]


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of inputs given as a tuple, a dict of keywords, or (tuple, dict)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return tuple(inputs), {}
