"""Once for all: weights that serve every size are trained, then counts are allocated on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from spacompiler.gates.gating import Gating
from spacompiler.stages.records import Scheduling, Scored


@dataclass(frozen=True)
class OnceForAll(Gating):
    """Sandwich training: all weights learn under the whole network, the target, and sizes between.

    Own loss and divergence from the dense network together. Slices are ranked by `criterion` and
    stay so, as sorted channels do in Once-for-All (Cai et al., ICLR 2020). Then the allocation that
    is asked for finds counts on the trained network: `--allocation search`.
    """

    name: ClassVar[str] = "once-for-all"
    use: ClassVar[str] = "weights are to serve every size that a search may try"
    tags: ClassVar[tuple[str, ...]] = ("during", "learned", "widths", "distillation", "search")
    allocates: ClassVar[bool] = True
    criterion: str = "magnitude"
    budget: str = "sandwich"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.0
    task: float = 1.0
    logits: float = 1.0

    def run(self, task: Scheduling) -> Scored:
        """Train, then allocate; scores are those of the criterion."""
        found = super().run(task)
        counts, stock = task.allocate(found.candidates, found.scores)
        return replace(found, counts=counts, stock=stock)
