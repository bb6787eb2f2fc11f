"""Linear layers as products of two smaller ones: y = B (A x) + b, a sequence of two layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...errors import SpaError
from .apart import fresh

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (rank, in) and B (out, rank)."""


def factored(module: nn.Module, ranks: Mapping[str, int],
             factors: Mapping[str, Factors] | None = None) -> nn.Module:
    """Return a copy in which each layer of `ranks` is a sequence of two, of that rank.

    Arrays that stay share the memory of the network given; without `factors` the new ones are
    zeros, to be loaded over. Raises SpaError where a path is no linear layer.
    """
    if not ranks:
        return module
    memo: dict[int, Any] = {id(t): fresh(t) for t in (*module.parameters(), *module.buffers())}
    made = copy.deepcopy(module, memo)
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        try:
            layer = made.get_submodule(path)
        except AttributeError:
            layer = made
        if type(layer) is not nn.Linear or not name or not 0 < rank <= min(layer.weight.shape):
            raise SpaError(f"{path} is no linear layer of rank {rank} or more",
                           where=type(module).__name__,
                           why="the artifact says that it became a product of two",
                           fix="pass the dense module that it was made from")
        made.get_submodule(parent)._modules[name] = _two(
            layer, rank, None if factors is None else factors[path])
    return made


def _two(layer: nn.Linear, rank: int, given: Factors | None) -> nn.Sequential:
    """The same layer as two: the first has no bias, the second the layer's own."""
    down, up = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    a, b = given or (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
    for part, value in ((down, a), (up, b)):
        part.weight = nn.Parameter(value.to(layer.weight).contiguous(),
                                   requires_grad=layer.weight.requires_grad)
        part.out_features, part.in_features = value.shape
    up.bias = layer.bias
    made = nn.Sequential(down, up)
    made.train(layer.training)
    return made
