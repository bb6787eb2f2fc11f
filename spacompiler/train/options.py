"""Options of training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..evidence.losses import compares_classes


@dataclass(frozen=True)
class Schedule:
    """Options of every recovery pass; a pass adds which parameters it trains.

    Args:
        lr: peak learning rate of AdamW; warmed up over a share `warmup` of the steps, then cosine.
        epochs: times that each batch is seen. `accumulate`: batches of one step.
        task, logits, blocks: weights of the network's own loss, of the divergence from the dense
            network's results (at `temperature`), and of the error of each block given the dense
            network's inputs to it. Where no weight `logits` is given it is 1 if those results are
            known to be logits, and there is a dense network; else 0.
        ahead: how many tokens each position of a text foretells while it trains (1: the next one);
            the mean loss of the further ones, by heads that are thrown away, is added with the
            weight `further` (`ahead.py`). Held-out text is judged without it.
        evaluations: how often the held-out batches are looked at while it trains (0: as often as
            takes a sixteenth as many batches as are trained on, once to 8 times). `patience`: stop
            after so many evaluations without a better one.

    A pass that `shares` lets several processes each run some batches of a step: it calls `train` on
    `task` itself, the same in each of them, and looks at no single batch but through its gradients.
    """

    shares: ClassVar[bool] = False

    lr: float = 1e-3
    epochs: int = 1
    accumulate: int = 4
    warmup: float = 0.05
    clip: float = 1.0
    decay: float = 0.0
    task: float = 1.0
    logits: float | None = None
    temperature: float = 1.0
    blocks: float = 0.0
    ahead: int = 1
    further: float = 0.3
    evaluations: int = 0
    patience: int = 3

    def __post_init__(self) -> None:
        weights = self.task, self.logits or 0.0, self.blocks
        if min(weights) < 0 or not any(weights):
            raise TypeError("task, logits and blocks must be 0 or more, and not all 0")
        if self.accumulate < 1 or self.epochs < 1:
            raise TypeError("accumulate and epochs must be at least 1")
        if self.ahead < 1 or self.further <= 0:
            raise TypeError("ahead must be at least 1, and further above 0")

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    def divergence(self, loss: object, dense: object) -> float:
        """Return the weight of the divergence from a dense network, beside a loss."""
        if self.logits is not None:
            return self.logits
        return float(dense is not None and self.task > 0 and compares_classes(loss))
