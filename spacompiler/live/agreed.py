"""Pruning in a training of several processes: all go by the same scores, and no wrapper is cut.

Each process sees gradients of its own data. What is removed follows from the mean of all processes'
scores, taken in the order of their numbers, so that the plan is one. DistributedDataParallel has
buffers of fixed sizes for gradients: the module is pruned between two wrappings.
"""

from __future__ import annotations

import gc
import sys
from typing import cast
from weakref import ref

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from spacompiler.errors import UsageError

SHARDED = (("torch.distributed.tensor", "DTensor"),
           ("torch.distributed.fsdp", "FullyShardedDataParallel"))
"""What a sharded module has among its arrays and parts."""


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the mean of all processes' scores, the same in each: all must call it."""
    count = processes()
    if count == 1 or not scores:
        return scores
    names = sorted(scores)
    flat = torch.from_numpy(np.concatenate([scores[n].reshape(-1) for n in names]))
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = flat.to(place, torch.float64)
    every = [torch.empty_like(mine) for _ in range(count)]
    dist.all_gather(every, mine)
    total = every[0]
    for other in every[1:]:
        total = total + other
    parts = np.split((total / count).cpu().numpy(), np.cumsum(
        [scores[n].size for n in names])[:-1])
    return {n: part.reshape(scores[n].shape) for n, part in zip(names, parts, strict=True)}


class Wrapper:
    """Notices the DistributedDataParallel that runs a module; raises UsageError for one itself."""

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise wrapped()
        _check_whole(module)
        self._module, self._seen = module, cast("ref[nn.Module] | None", None)
        self._handle = module.register_forward_pre_hook(self._look) if processes() > 1 else None

    def _look(self, module: nn.Module, args: object) -> None:
        active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if active is not None and getattr(active, "module", None) is module:
            self._seen = ref(active)

    def check(self, *, shrinks: bool) -> None:
        """Raise UsageError if the module shrinks while a wrapper is there."""
        if shrinks:
            _check_whole(self._module)
        if shrinks and self._seen is not None and self._seen() is not None:
            gc.collect()  # one that nobody uses may be in a circle with its hooks
            if self._seen() is not None:
                raise wrapped()

    def stop(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def _check_whole(module: nn.Module) -> None:
    """Raise UsageError for a module of whose arrays each process has a part (FSDP)."""
    found = (getattr(sys.modules.get(place), name, None) for place, name in SHARDED)
    kinds = tuple(kind for kind in found if isinstance(kind, type))  # none is there unimported
    if any(isinstance(part, kinds) for part in (*module.modules(), *module.parameters())):
        raise UsageError(
            "a sharded module cannot shrink in place", where=type(module).__name__,
            why="each process holds a part of every array, and slices go from whole ones",
            fix="prune before fully_shard, or train with DistributedDataParallel until the "
                "pruner is done")


def wrapped() -> UsageError:
    """What is said of a module that is wrapped."""
    return UsageError(
        "a DistributedDataParallel module cannot shrink in place",
        why="its gradient buckets have fixed sizes",
        fix="prune the module between two wrappings: model = ddp.module; del ddp; "
            "pruner.shrink(share); ddp = DistributedDataParallel(model)")
