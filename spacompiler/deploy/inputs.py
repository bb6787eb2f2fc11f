"""Example inputs at other sizes, and the names of axes that vary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsInt, TypeVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..torch_backend.trace import Trace

T = TypeVar("T")


def other_inputs(trace: Trace, which: int,
                 most: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs at other sizes than those traced: values repeat, cut or tiled.

    Equal traced sizes of varying dimensions change alike; `most` bounds lengths.
    """
    bounds = _bounds(trace, most)
    new = {old: max(1, [old + 1 + i, max(1, old // 2) + i][which % 2])
           for i, old in enumerate(sorted(bounds))}
    new = {old: _within(size, old, which, *bounds[old]) for old, size in new.items()}
    return resized((trace.args, trace.kwargs), _varying(trace), lambda d, old: new[old])


def resized(inputs: T, free: Sequence[Iterable[int]], size: Callable[[int, int], int]) -> T:
    """Return nested inputs of other sizes: along free dimensions values repeat, cut or tiled.

    `free` names those of each tensor in turn; `size(dimension, old)` gives the new size.

    >>> resized({"x": torch.tensor([[1, 2, 3]])}, [[1]], lambda d, n: n + 1)
    {'x': tensor([[1, 2, 3, 1]])}
    """
    turn = iter(free)

    def resize(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        for d in next(turn):
            old = value.shape[d]
            value = value.index_select(d, torch.arange(size(d, old)) % old)
        return value

    made: T = pytree.tree_map(resize, inputs)
    return made


def _varying(trace: Trace) -> list[list[int]]:
    return [sorted(trace.graph.tensors[name].dynamic) for name in trace.graph.inputs]


Range = tuple[float, float]


def _within(size: int, old: int, which: int, low: float, high: float) -> int:
    """A size that a program serves, another one than was traced where there is one."""
    tries = (size, old + 1 + which, old - 1 - which, old + 1, old - 1)
    return next((n for n in tries if max(1, low) <= n <= high), old)


def _bounds(trace: Trace, most: int | None) -> dict[int, Range]:
    """The least and the largest size that each traced size of a varying dimension may become."""
    ranges = getattr(trace.program, "range_constraints", {})
    known = {n.name: [_range(size, ranges) for size in getattr(n.meta.get("val"), "shape", ())]
             for n in trace.program.graph.nodes if n.op == "placeholder"}
    found: dict[int, Range] = {}
    for name in trace.graph.inputs:
        held = trace.graph.tensors[name]
        for d in held.dynamic:
            low, high = known[name][d]
            low = low if low > 2 else 1  # torch.export says two of every size
            before = found.get(held.shape[d], (1, float("inf")))
            high = min(high, most) if most and d else high
            found[held.shape[d]] = max(low, before[0]), min(high, before[1])
    return found


def _range(size: object, ranges: Mapping[Any, Any]) -> Range:
    node = getattr(size, "node", None)
    known = ranges.get(node.expr) if node is not None else None
    return _number(getattr(known, "lower", None), 1), \
        _number(getattr(known, "upper", None), float("inf"))


def _number(bound: SupportsInt | None, none: float) -> float:
    if bound is None:
        return none
    try:
        return float(int(bound))
    except (TypeError, OverflowError, ValueError, AttributeError):  # no bound
        return none


def feed(trace: Trace, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return a call's tensors as arrays by the names of the graph's inputs."""
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    return {name: t.numpy() for name, t in zip(trace.graph.inputs, tensors, strict=True)}


def axis_names(trace: Trace) -> dict[str, dict[int, str]]:
    """Readable names of varying dimensions: batch, sequence, then axis numbers.

    One name says one size: those of an input that may differ from the first one's bear its name.
    """
    names = {0: "batch", 1: "sequence"}
    sizes = {n.name: [str(size) for size in getattr(n.meta.get("val"), "shape", ())]
             for n in trace.program.graph.nodes if n.op == "placeholder"}
    first: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for name in trace.graph.inputs:
        for d in sorted(trace.graph.tensors[name].dynamic):
            said = names.get(d, f"axis{d}")
            if first.setdefault(said, sizes[name][d]) != sizes[name][d]:
                said = f"{name}_{said}"
            found.setdefault(name, {})[d] = said
    return found


def latency_inputs(trace: Trace, length: int = 128) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs for timing: batch 1, sequences of `length` or what is possible."""
    return timed_inputs(trace, 1, length)


def timed_inputs(trace: Trace, batch: int,
                 length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs of a batch and a length, or of the sizes next to them that there are.
    """
    bounds = _bounds(trace, length)

    def size(d: int, old: int) -> int:
        low, high = bounds[old]
        return int(max(low, min(batch, high))) if d == 0 else int(max(low, min(length, high)))

    return resized((trace.args, trace.kwargs), _varying(trace), size)
