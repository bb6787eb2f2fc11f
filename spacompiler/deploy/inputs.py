"""Example inputs at other sizes, and the names of axes that vary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..torch_backend.trace import Trace


def other_inputs(trace: Trace, which: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs at other sizes than those traced: values repeat, cut or tiled.

    Equal traced sizes of varying dimensions change alike.
    """
    sizes = sorted({t.shape[d] for n in trace.graph.inputs
                    for t in (trace.graph.tensors[n],) for d in t.dynamic})
    new = {old: max(1, [old + 1 + i, max(1, old // 2) + i][which % 2])
           for i, old in enumerate(sizes)}
    names = iter(trace.graph.inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = trace.graph.tensors[next(names)]
        for d in sorted(tensor.dynamic):
            index = torch.arange(new[value.shape[d]]) % value.shape[d]
            value = value.index_select(d, index)
        return value

    args, kwargs = pytree.tree_map(resize, (trace.args, trace.kwargs))
    return args, kwargs


def _feed(trace: Trace, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    return {name: t.numpy() for name, t in zip(trace.graph.inputs, tensors, strict=True)}


def axis_names(trace: Trace) -> dict[str, dict[int, str]]:
    """Readable names of varying dimensions: batch, sequence, then axis numbers."""
    names = {0: "batch", 1: "sequence"}
    return {n: {d: names.get(d, f"axis{d}") for d in trace.graph.tensors[n].dynamic}
            for n in trace.graph.inputs if trace.graph.tensors[n].dynamic}


def latency_inputs(trace: Trace, length: int = 128) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs for timing: batch 1, sequences of `length`."""
    names = iter(trace.graph.inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dynamic = trace.graph.tensors[next(names)].dynamic
        for d in sorted(dynamic):
            size = 1 if d == 0 else length
            value = value.index_select(d, torch.arange(size) % value.shape[d])
        return value

    args, kwargs = pytree.tree_map(resize, (trace.args, trace.kwargs))
    return args, kwargs
