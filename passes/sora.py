"""SoRA, DyLoRA and IncreLoRA: ranks behind gates, that vanish, nest or grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spacompiler.passes.lora import AdapterHooks, Lora
from spacompiler.train.loop import Training
from spacompiler.train.ranks import Ranks


@dataclass(frozen=True)
class Sora(Lora):
    """B diag(g) A, g shrunk by `threshold` after each step: ranks that help too little vanish.

    SoRA (Ding et al., EMNLP 2023): g <- sign(g) max(|g| - threshold, 0).
    """

    name: ClassVar[str] = "sora"
    threshold: float = 1e-3

    def hooks(self, task: Training) -> AdapterHooks:
        """Gates that train, and a proximal step on them."""
        return _Sparse(self.plus, Ranks(task.module, learned=True), self.threshold)


@dataclass(frozen=True)
class Dylora(Lora):
    """Each step trains a prefix of the ranks, drawn anew: every prefix is an adapter of its own.

    DyLoRA (Valipour et al., EACL 2023). Of `prefix` ranks are merged (0: all).
    """

    name: ClassVar[str] = "dylora"
    prefix: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prefix <= self.rank:
            raise TypeError("prefix is a number of ranks, at most rank")

    def hooks(self, task: Training) -> AdapterHooks:
        """Prefixes that are drawn."""
        return _Prefixes(self.plus, Ranks(task.module), self.prefix or self.rank, task.seed)


@dataclass(frozen=True)
class Increlora(Lora):
    """All adapters start at `start` ranks; `every` so many steps the `top` of them get `more`.

    IncreLoRA (Zhang et al., 2023): by a moving average of |p dL/dp| over an adapter's parameters,
    times one of its deviation, up to `total` ranks (0: half of what `rank` a layer allows). Ranks
    that wait have their A drawn already, and B at zero.
    """

    name: ClassVar[str] = "increlora"
    start: int = 2
    every: int = 2
    top: int = 2
    more: int = 1
    total: int = 0
    momentum: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.start, self.every, self.top, self.more) < 1 or self.start > self.rank:
            raise TypeError("start, every, top and more must be at least 1, start at most rank")

    def hooks(self, task: Training) -> AdapterHooks:
        """Ranks that grow."""
        return _Growing(self, Ranks(task.module))


class _Gated(AdapterHooks):
    """Adapters whose ranks are behind gates."""

    def __init__(self, plus: float, ranks: Ranks) -> None:
        super().__init__(plus)
        self.ranks = ranks

    def finish(self) -> dict[str, Any]:
        """Fold the gates, and say how many ranks are open in each layer."""
        opened = {path: int((gate != 0).sum()) for (path, _, _), gate
                  in zip(self.ranks.pairs, self.ranks.gates(), strict=True)}
        self.ranks.fold()
        return {"ranks": opened}


class _Sparse(_Gated):
    def __init__(self, plus: float, ranks: Ranks, threshold: float) -> None:
        super().__init__(plus, ranks)
        self._threshold = threshold

    @torch.no_grad()
    def done(self, step: int, rate: float) -> None:
        """Shrink the gates."""
        for gate in self.ranks.gates():
            gate.copy_(gate.sign() * (gate.abs() - self._threshold).clamp(min=0))


class _Prefixes(_Gated):
    def __init__(self, plus: float, ranks: Ranks, kept: int, seed: int) -> None:
        super().__init__(plus, ranks)
        self._kept, self._seed = kept, seed
        self._open(kept)

    def _open(self, count: int) -> None:
        for gate in self.ranks.gates():
            gate.copy_(torch.arange(len(gate), device=gate.device) < count)

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Open a prefix."""
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        self._open(int(torch.randint(1, len(self.ranks.gates()[0]) + 1, (), generator=draws)))

    def done(self, step: int, rate: float) -> None:
        """Open what is to be merged: it is what held-out batches see."""
        self._open(self._kept)


class _Growing(_Gated):
    """Scores wait in buffers beside the gates, so that a checkpoint holds them."""

    def __init__(self, row: Increlora, ranks: Ranks) -> None:
        super().__init__(row.plus, ranks)
        self._row = row
        sizes = [len(gate) for gate in ranks.gates()]
        self._total = row.total or sum(sizes) // 2
        for _, down, _ in ranks.pairs:
            down.register_buffer("mean_score", down.weight.new_zeros(()))
            down.register_buffer("score_spread", down.weight.new_zeros(()))
        for gate in ranks.gates():
            gate.copy_(torch.arange(len(gate), device=gate.device) < row.start)

    @torch.no_grad()
    def graded(self, step: int) -> None:
        """Take in a step's gradients, and grow where it is due."""
        m = self._row.momentum
        for _, down, up in self.ranks.pairs:
            parts = [p.weight * p.weight.grad for p in (down, up) if p.weight.grad is not None]
            score = sum(float(x.abs().sum()) for x in parts) / max(sum(x.numel() for x in parts), 1)
            off = abs(score - float(down.mean_score))
            down.mean_score.mul_(m).add_((1 - m) * score)
            down.score_spread.mul_(m).add_((1 - m) * off)

    def done(self, step: int, rate: float) -> None:
        """Open more ranks where scores are highest, within the total."""
        if (step + 1) % self._row.every:
            return
        order = sorted(self.ranks.pairs, key=lambda p: -float(p[1].mean_score * p[1].score_spread))
        grown = 0
        for _, down, _ in order:
            gate: torch.Tensor = down.get_buffer("rank_gate")
            have = int(gate.sum())
            left = self._total - sum(int(g.sum()) for g in self.ranks.gates())
            more = min(self._row.more, len(gate) - have, left)
            if more > 0 and grown < self._row.top:
                gate[have:have + more] = 1.0
                grown += 1

    def finish(self) -> dict[str, Any]:
        """Fold the gates and take the scores away."""
        for _, down, _ in self.ranks.pairs:
            del down.mean_score, down.score_spread
        return super().finish()

