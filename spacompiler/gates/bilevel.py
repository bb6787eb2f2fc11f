"""Bi-level learning: weights answer to masks, masks know of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..evidence.calls import Batch
from .folding import products
from .learning import Learner


@dataclass
class Bilevel(Learner):
    """Two batches a step: one for what trains beside, under a decay, then one for the gates.

    The gates' gradient has the implicit term of bilinear masks, - (1 / decay) m g_z . g_z summed
    over a slice, g_z the gradient by the masked weights that read it (BiP, NeurIPS 2022).
    """

    decay: float = 1.0

    def step(self, batches: Iterator[Batch], at: float) -> None:
        """Take the lower step, then the upper one."""
        own = self.relaxation.parameters.values()
        self.objective(next(batches), at).backward()
        for p in own:
            p.grad = None
        self._descend()
        self.objective(next(batches), at).backward()
        self._imply()
        for p in self.beside.parameters.values():
            p.grad = None
        self._mend()
        self._descend()

    def _descend(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _imply(self) -> None:
        """Add the implicit term to the gradients of gates."""
        gated, slopes = self.gated, self.relaxation.open(1.0)
        terms: list[torch.Tensor] = []
        for place, at in products(gated.solution, list(gated.places)).items():
            name = gated.solution.graph.tensors[at.weight].weight
            weight = self.beside.parameters.get(name or "")
            if weight is None or weight.grad is None:
                continue
            squares = at.matrix(weight.grad).square().sum(1)
            for group, _ in gated.places[place]:
                slot = gated.features(place, at, group)
                z = torch.cat([slopes[group.name].reshape(-1), torch.zeros(1)])[slot]
                kept = torch.cat([self._kept[group.name].reshape(-1).float(), torch.zeros(1)])[slot]
                terms.append(-(kept * squares * z).sum() / self.decay)
        if terms:
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
