"""Adapters of plain LoRA computed with less beside the network's own products.

peft computes W x, then B (A x), its product with the scale, and the sum: each of the last three
makes an array as large as the layer's result, and backward goes through them again. Here the small
product is added to the large one as it is made, with the scale as its factor. Gradients are those
of the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .ranks import pairs


@contextmanager
def lean(module: nn.Module) -> Iterator[None]:
    """Let linear layers with one plain adapter compute it so; others stay as peft has them."""
    layers = [layer for path, _, _ in pairs(module) if _plain(layer := module.get_submodule(path))]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _plain(layer: nn.Module) -> bool:
    """Whether an adapted layer is a linear one, with one adapter of LoRA in the base's type."""
    within: Callable[[], nn.Module] = layer.get_base_layer  # type: ignore[assignment]
    base, ups, downs = within(), layer.lora_B, layer.lora_A
    assert isinstance(ups, nn.ModuleDict) and isinstance(downs, nn.ModuleDict)
    if type(base) is not nn.Linear or len(ups) != 1 or getattr(layer, "lora_variant", None):
        return False
    (up,), (down,) = ups.values(), downs.values()
    return type(up) is nn.Linear and up.bias is None \
        and base.weight.dtype == up.weight.dtype == down.weight.dtype


def _forward(layer: Any, plain: Callable[..., Any], x: torch.Tensor, *args: object,
             **kwargs: object) -> Any:
    """Return W x + scale B (A x); x (..., i)."""
    (name,) = layer.lora_B
    if args or kwargs or layer.disable_adapters or layer.merged or not layer.active_adapters \
            or x.dtype != layer.get_base_layer().weight.dtype or layer.lora_B[name]._forward_hooks:
        return plain(x, *args, **kwargs)
    flat = x.reshape(-1, x.shape[-1])
    small = layer.lora_A[name](layer.lora_dropout[name](flat))
    made = layer.base_layer(flat).addmm_(small, layer.lora_B[name].weight.T,
                                         alpha=layer.scaling[name])
    return made.view(*x.shape[:-1], made.shape[-1])
