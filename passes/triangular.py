"""TriAdaptLoRA: a core between the two matrices of each adapter that grows by rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spacompiler.errors import SpaError
from spacompiler.passes.lora import AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.ranks import CORE, Cores

SIZE, NORM = "core_size", "core_norm"


@dataclass(frozen=True)
class Triadapt(Lora):
    """B C A: C a square that grows by `more` rows of its lower and columns of its upper triangle.

    TriAdaptLoRA (2025): all start at `start`; `every` so many steps those adapters grow whose norm
    of C by its size has risen most since, as many as a line up to `total` ranks says (0: half of
    what `rank` a layer allows). Linear layers alone.
    """

    name: ClassVar[str] = "triadapt"
    start: int = 2
    every: int = 2
    more: int = 1
    total: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.start, self.every, self.more) < 1 or self.start > self.rank or self.dora:
            raise TypeError("start, every and more must be at least 1, start at most rank; no dora")

    def hooks(self, task: Training) -> AdapterHooks:
        """Cores that grow."""
        cores = Cores(task.module, frozen=False)
        if not cores.pairs:
            raise SpaError(f"{self.name} finds no linear layer", fix="use --recover lora")
        steps = self.epochs * -(-len(task.batches) // self.accumulate)
        return _Growing(self, cores, steps)


class _Growing(AdapterHooks):
    """Sizes and norms wait in buffers beside the cores, so that a checkpoint holds them."""

    def __init__(self, row: Triadapt, cores: Cores, steps: int) -> None:
        super().__init__(row.plus)
        self._row, self.cores, self._steps = row, cores, max(steps, 1)
        self._parts = [down for _, down, _ in cores.pairs]
        self._first = row.start * len(self._parts)
        self._total = row.total or max(
            self._first, sum(len(_core(p)) for p in self._parts) // 2)
        for part in self._parts:
            core = _core(part)
            size = min(row.start, len(core))
            core.data.copy_(torch.diag((torch.arange(len(core)) < size).to(core)))
            part.register_buffer(SIZE, torch.tensor(size))
            part.register_buffer(NORM, core.data.norm() / size)

    def graded(self, step: int) -> None:
        """What is not open yet does not move."""
        for part in self._parts:
            core, size = _core(part), int(part.get_buffer(SIZE))
            if core.grad is not None:
                core.grad[size:] = 0
                core.grad[:, size:] = 0

    @torch.no_grad()
    def done(self, step: int, rate: float) -> None:
        """Open rows and columns where norms have risen most; a new rank starts as a plain one."""
        if (step + 1) % self._row.every:
            return
        share = min(1.0, 2 * (step + 1) / self._steps)  # the second half trains what has grown
        due = self._first + round(share * (self._total - self._first)) - sum(
            int(p.get_buffer(SIZE)) for p in self._parts)
        norms = [_core(p).norm() / p.get_buffer(SIZE) for p in self._parts]
        rises = [float(n - p.get_buffer(NORM)) for n, p in zip(norms, self._parts, strict=True)]
        for i in sorted(range(len(rises)), key=lambda i: -rises[i]):
            core, size = _core(self._parts[i]), self._parts[i].get_buffer(SIZE)
            more = min(self._row.more, len(core) - int(size), due)
            if more > 0:
                at = torch.arange(int(size), int(size) + more)
                core[at, at] = 1.0
                size += more
                due -= more
            self._parts[i].get_buffer(NORM).copy_(core.norm() / size)

    def finish(self) -> dict[str, Any]:
        """Fold the cores, and say how large each has grown."""
        sizes = {path: int(down.get_buffer(SIZE)) for path, down, _ in self.cores.pairs}
        for part in self._parts:
            delattr(part, SIZE)
            delattr(part, NORM)
        self.cores.fold()
        return {"ranks": sizes}


def _core(part: nn.Module) -> nn.Parameter:
    return part.get_parameter(CORE)
