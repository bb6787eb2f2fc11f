"""Copies of a module to be run for its sizes alone: its arrays shared, or without their data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..copying import copied

_META = torch.device("meta")


def sharing(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the parameters."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    return copied(module, memo).eval()


def weightless(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[
        nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a copy in eval mode whose arrays, and the inputs, have sizes and types alone."""
    memo: dict[int, Any] = {id(b): b.to(_META) for b in module.buffers()}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to(_META), requires_grad=False)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(_META), (args, kwargs))
    return copied(module, memo).eval(), args, kwargs
