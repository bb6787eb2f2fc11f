"""What couples the members of a group: how their scores become one, which of them are gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..graph.ir import Ref
from ..groups.solution import Solution

# normalisations: which argument is the gain
_GAINS = {"batch_norm": 1, "_native_batch_norm_legit_no_training": 1, "instance_norm": 1,
          "BatchNormalization": 1, "layer_norm": 2, "group_norm": 2, "rms_norm": 2}
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "mean": lambda parts: parts.mean(0),
    "max": lambda parts: parts.amax(0),
    "prod": lambda parts: parts.prod(0),
    "first": lambda parts: parts[0],
    "last": lambda parts: parts[-1],
}


def reduced(parts: Sequence[torch.Tensor], how: str) -> torch.Tensor:
    """Reduce the scores of members, each of the group's shape, by a name of REDUCTIONS.

    >>> reduced([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], "mean").tolist()
    [2.0, 3.0]
    """
    return REDUCTIONS[how](torch.stack(list(parts)))


def check_reduction(how: str) -> None:
    """Raise TypeError for an unknown reduction."""
    if how not in REDUCTIONS:
        raise TypeError(f"reduce must be one of {', '.join(REDUCTIONS)}")


def gains(solution: Solution) -> set[str]:
    """Return the stored arrays that normalisations scale channels by."""
    graph = solution.graph
    found: set[str | None] = {norm.gain for norm in solution.solver.norms.values()}
    for node in graph.nodes:
        at = next((_GAINS[part] for part in node.op.split(".") if part in _GAINS), None)
        if at is not None and isinstance(node.arg(at, "weight"), Ref):
            found.add(graph.tensors[node.arg(at, "weight").name].weight)
    return {name for name in found if name is not None}
