"""Once for all: weights that serve every size are trained, then counts are allocated on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from spacompiler.gates.gating import Gating
from spacompiler.gates.learning import Learner
from spacompiler.gates.network import Gated
from spacompiler.gates.projection import tables
from spacompiler.plan.problem import Problem
from spacompiler.stages.records import Scheduling, Scored


@dataclass(frozen=True)
class OnceForAll(Gating):
    """Sandwich training: all weights learn under the whole network, the target, and sizes between.

    Own loss and divergence from the dense network together. Slices are ranked by `criterion` and
    stay so, as sorted channels do in Once-for-All (Cai et al., ICLR 2020). Then the allocation that
    is asked for finds counts on the trained network: `--allocation search`.
    """

    name: ClassVar[str] = "once-for-all"
    allocates: ClassVar[bool] = True
    criterion: str = "magnitude"
    budget: str = "sandwich"
    beside: str = "everything"
    steps: int = 200
    lr: float = 0.0
    task: float = 1.0
    logits: float = 1.0

    def run(self, task: Scheduling) -> Scored:
        """Train, then allocate; statistics of the dense network say nothing of the trained one."""
        return replace(super().run(task), context=None)

    def _settled(self, task: Scheduling, gated: Gated, made: Learner,
                 problems: Sequence[tuple[Problem, str]]) -> tuple[dict[str, int], str]:
        """Put the trained weights into the program, whole, and let the allocation find counts."""
        groups, order = list(gated.groups), made.order()
        self._fold(task, gated, made, tables(groups, order, {g.name: g.size for g in groups}))
        return task.allocate(groups, order)
