"""Sizes that a traced program is fixed at although they are written as symbols.

A module may compute with a size in ways that no symbol survives (`int(x.shape[0] / 4)`): torch
then notes what must hold of the inputs' sizes, and refuses others when it is called.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...graph.ir import Graph

_SIZE = re.compile(r"(L(?:\[[^\[\]]+\])+)\.size\(\)\[(\d+)\]")


def settle(graph: Graph, program: object, module: nn.Module, args: tuple[Any, ...],
           kwargs: dict[str, Any]) -> None:
    """Take from the inputs' varying dimensions those that the program's guards fix, in place."""
    guards = [g for g in getattr(program, "_guards_code", None) or () if "==" in g]
    if not guards:
        return
    try:
        held = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        fixed = {place for guard in guards for place in _fixed(guard, held)}
    except Exception:  # a guard in words that are not known here says nothing
        return
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    for name, tensor in zip(graph.inputs, tensors, strict=True):
        gone = {dim for at, dim in fixed if at == id(tensor)}
        graph.tensors[name].dynamic = graph.tensors[name].dynamic - gone


def _fixed(guard: str, held: Mapping[str, Any]) -> set[tuple[int, int]]:
    """The places (tensor, dimension) that a guard speaks of, if it fails where they are larger.

    Equal sizes grow alike.
    """
    found = {(id(tensor), int(dim)): tensor.shape[int(dim)] for text, dim in _SIZE.findall(guard)
             for tensor in (eval(text, {"L": held}),)}
    fixed: set[tuple[int, int]] = set()
    for size in set(found.values()):
        def grown(match: re.Match[str], size: int = size) -> str:
            now = eval(match[1], {"L": held}).shape[int(match[2])]
            return str(now + 1 if now == size else now)

        if not eval(_SIZE.sub(grown, guard), {"math": math, "torch": torch}):
            fixed |= {place for place, n in found.items() if n == size}
    return fixed
