"""Adapters of plain LoRA computed with less beside the network's own products.

peft computes W x, then B (A x), its product with the scale, and the sum: each of the last three
makes an array as large as the layer's result, and backward goes through them again. Here the small
product is added to the large one as it is made, with the scale as its factor, forward and backward.
Gradients are those of the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

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
    if len(ups) != 1 or getattr(layer, "lora_variant", None) \
            or not (type(base) is nn.Linear or hasattr(base, "computes")):
        return False
    (up,), (down,) = ups.values(), downs.values()
    return type(up) is nn.Linear and up.bias is None \
        and _type(base) == up.weight.dtype == down.weight.dtype


def _type(base: nn.Module) -> object:
    """What a layer computes in; one whose weight is held in 8 bits says it (`eight_bits.py`)."""
    return getattr(base, "computes", base.weight.dtype)


def _forward(layer: Any, plain: Callable[..., Any], x: torch.Tensor, *args: object,
             **kwargs: object) -> Any:
    """Return W x + scale B (A x); x (..., i)."""
    (name,) = layer.lora_B
    if args or kwargs or layer.disable_adapters or layer.merged or not layer.active_adapters \
            or x.dtype != _type(layer.get_base_layer()) or layer.lora_B[name]._forward_hooks:
        return plain(x, *args, **kwargs)
    flat, scale = x.reshape(-1, x.shape[-1]), layer.scaling[name]
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name].weight
    if _bare(base) and _bare(down) and type(layer.lora_dropout[name]) is nn.Identity \
            and type(base) is nn.Linear:
        made = _Sum.apply(flat, base.weight, base.bias, down.weight, up, scale)
    else:
        made = base(flat).addmm_(down(layer.lora_dropout[name](flat)), up.T, alpha=scale)
    return made.view(*x.shape[:-1], made.shape[-1])


def _bare(layer: nn.Module) -> bool:
    """Whether nothing listens to what a layer takes and gives."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


class _Sum(torch.autograd.Function):
    """W x + c + scale B (A x) of rows x (n, i), W (o, i), A (r, i), B (o, r)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
        small = x @ down.T
        ctx.save_for_backward(x, weight, down, up, small)
        ctx.scale = scale
        return functional.linear(x, weight, bias).addmm_(small, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, up, small = ctx.saved_tensors
        to_x, to_weight, to_bias, to_down, to_up, _ = ctx.needs_input_grad
        inner = (outer @ up).mul_(ctx.scale)
        return ((outer @ weight).addmm_(inner, down) if to_x else None,
                outer.T @ x if to_weight else None, outer.sum(0) if to_bias else None,
                inner.T @ x if to_down else None,
                (outer.T @ small).mul_(ctx.scale) if to_up else None, None)
