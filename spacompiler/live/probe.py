"""Adapter gradients for a compile: adapters on the dense module while it is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree

from spacompiler.errors import UsageError
from spacompiler.evidence.calls import Batch
from spacompiler.evidence.labels import labels_of
from spacompiler.evidence.network import Loss
from spacompiler.groups.solution import Group, Solution
from spacompiler.live.attached import Attached, adaptable
from spacompiler.live.watch import Watch
from spacompiler.torch_backend.run.recompute import budget, lean_blocks
from spacompiler.torch_backend.trace import Trace
from spacompiler.torch_backend.untouched import untouched
from spacompiler.train.objective import blocks

RANK, ALPHA = 8, 16


class Probe(Watch):
    """A context whose adapters have seen all calibration batches; `close` takes them off.

    Raises UsageError if anything but their gradients is needed.
    """

    def __init__(self, module: nn.Module, trace: Trace, solution: Solution, needs: Iterable[str],
                 seed: int = 0) -> None:
        super().__init__(module, trace, solution, (), ("adapter_steps",), seed)
        other = sorted(set(needs) - {"adapter_steps"})
        if other:
            raise UsageError(f"statistic {other[0]!r} cannot be had beside adapter_steps",
                             why="with adapters on, nothing but their gradients is gathered",
                             fix="use an importance pass that needs only one of them")
        self._attached: Attached | None = None

    def calibrate(self, needs: Iterable[str], batches: Iterable[Batch], loss: Loss, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Put adapters on, and sum their gradients over batches of (args, kwargs)."""
        self._attached = Attached(self._module, adaptable(self._module, groups),
                                  r=RANK, lora_alpha=ALPHA)
        with untouched(self._module), torch.enable_grad():
            for call in batches:
                args, kwargs = self.trace.match(*call)
                labels = labels_of(call[1], kwargs)
                held = budget(self.solution.graph, (self.trace.args, self.trace.kwargs), call)
                with lean_blocks((block for _, block in blocks(self._module)), held):
                    loss(pytree.tree_leaves(self._module(*args, **kwargs)),
                         args, {**kwargs, **labels}).backward()  # results are not held meanwhile
                tick()

    def close(self) -> None:
        """Take the adapters off again."""
        if self._attached is not None:
            self._attached.off(merge=False)
            self._attached = None
