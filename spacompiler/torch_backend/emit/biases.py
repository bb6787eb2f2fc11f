"""Zero biases, put where an adapter or a repair needs one and a layer has none."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ...evidence.consumers import consumer
from ...groups.solution import Group, Solution

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def add_bias(module: nn.Module, path: str) -> bool:
    """Give a linear layer or convolution a zero bias, in place; False if it has one or is none."""
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return False
    if not hasattr(layer, "bias") or layer.bias is not None:
        return False
    size = getattr(layer, "out_features", getattr(layer, "out_channels", 0))
    weight = layer.weight
    layer.bias = nn.Parameter(torch.zeros(size, dtype=weight.dtype, device=weight.device))
    return True


def with_biases(module: nn.Module, paths: Sequence[str], *, owned: bool = False) -> nn.Module:
    """Return the module, or a copy of it (unless it is `owned`), the named layers with biases."""
    have = set(module.state_dict())
    missing = [path for path in paths if f"{path}.bias" not in have]
    if not missing:
        return module
    made = module if owned else copy.deepcopy(module)
    for path in missing:
        add_bias(made, path)
    return made


def added(module: nn.Module, before: Iterable[str]) -> list[str]:
    """Return the paths of layers whose bias was not among the arrays of `before`."""
    return sorted(name.removesuffix(".bias") for name in module.state_dict().keys() - set(before)
                  if name.endswith(".bias"))


def unbiased(module: nn.Module, solution: Solution, groups: Sequence[Group]) -> list[str]:
    """Return the linear layers and convolutions that read a group and could have a bias."""
    nodes = {node.name: node for node in solution.graph.nodes}
    read = dict.fromkeys(r.node for g in groups for r in g.reads)
    found = []
    for node in (nodes[name] for name in read):
        at = consumer(solution.graph, node)
        weight = solution.graph.tensors[at.weight].weight if at is not None else None
        path = weight.rpartition(".")[0] if weight else ""
        if path and getattr(module.get_submodule(path), "bias", 0) is None \
                and isinstance(module.get_submodule(path), _LAYERS):
            found.append(path)
    return list(dict.fromkeys(found))
