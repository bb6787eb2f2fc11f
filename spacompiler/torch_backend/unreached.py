"""Sub-modules that the example inputs do not reach: auxiliary heads, training's branches, others.

Nothing was seen of them, so they stay as they are, and may not fit what was pruned around them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from torch import nn

from ..axes.choices import Choices, kept_size
from ..axes.expressions import atoms
from ..groups.solution import Solution
from .trace import Trace


def unreached(module: nn.Module, trace: Trace) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return, by the path of each outermost sub-module of which no array is read, its arrays."""
    read = _read(trace)
    mine: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, part in module.named_modules():
        own = {f"{path}.{name}".lstrip("."): tuple(p.shape)
               for name, p in part.named_parameters(remove_duplicate=False)}
        inside = any(path.startswith(f"{outer}.") for outer in mine)
        if path and own and not inside \
                and not read & {trace.tied.get(name, name) for name in own}:
            mine[path] = own
    return mine


def _read(trace: Trace) -> set[str]:
    """The first names of all stored arrays that some operator reads, or that were folded."""
    stored = {t.name: t.weight for t in trace.graph.tensors.values() if t.weight is not None}
    used = {name for node in trace.graph.nodes for name in node.refs()} | set(trace.graph.outputs)
    return {trace.tied.get(n, n) for n in trace.folded} | {
        stored[name] for name in used & stored.keys()}


def misfits(found: Mapping[str, Mapping[str, tuple[int, ...]]], solution: Solution,
            choices: Choices) -> list[str]:
    """Return notes on unreached sub-modules; those with a size that was pruned are named so."""
    changed = {e.size: kept_size(e, choices) for dims in solution.weights().values()
               for e in dims if any(a in choices for a in atoms(e))}
    notes = []
    for path, arrays in found.items():
        size = next((n for shape in arrays.values() for n in shape[1:]
                     if changed.get(n, n) != n), None)
        tail = "" if size is None else \
            f"; if it reads what went from {size} to {changed[size]}, it does not fit any more"
        notes.append(f"{path} is not reached by the example inputs (another branch, training mode "
                     f"or an output that was not asked for): it stays as it is{tail}")
    return notes


def share(found: Mapping[str, Mapping[str, tuple[int, ...]]], module: nn.Module) -> float:
    """Return which share of a module's parameters lies in what is not reached."""
    total = max(1, sum(p.numel() for p in module.parameters()))
    return sum(prod(shape) for arrays in found.values() for shape in arrays.values()) / total
