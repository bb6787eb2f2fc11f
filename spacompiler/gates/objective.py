"""What gates minimise: the own loss, the divergence from the dense network, errors of products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..evidence.calls import Batch
from ..evidence.losses import distance, first_floating
from ..torch_backend.run.runner import Runner
from ..torch_backend.trace import Trace

Loss = Callable[..., torch.Tensor]


@dataclass
class Aim:
    """task · loss + logits · KL(dense ‖ gated) + blocks · mean relative error of products.

    `dense` gives the dense network's arrays; `products` are nodes, those that read gated slices.
    The dense network runs once a batch, on the same span, and only if it is needed.
    """

    trace: Trace
    loss: Loss
    dense: Callable[[str], torch.Tensor]
    task: float = 0.0
    logits: float = 1.0
    blocks: float = 0.0
    products: Sequence[str] = ()
    _seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, node: str, value: torch.Tensor) -> None:
        """See what a node of the gated network gives."""
        if node in self.products:
            self._seen[node] = value

    def __call__(self, results: list[Any], batch: Batch) -> torch.Tensor:
        """Return the objective of the results of a batch."""
        total = self.task * self.loss(results, *batch) if self.task else torch.zeros(())
        if self.logits or self.blocks:
            dense, given = self._dense(batch)
            if self.logits:
                total = total + self.logits * distance(first_floating(results), dense)
            if self.blocks:
                total = total + self.blocks * self._errors(given)
        return total

    @torch.no_grad()
    def _dense(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        given: dict[str, torch.Tensor] = {}

        def keep(node: str, value: torch.Tensor) -> None:
            if node in self.products:
                given[node] = value

        runner = Runner(self.trace.program, self.dense, watch=keep if self.blocks else None)
        results = runner.call(*batch)
        runner.close()
        return first_floating(results), given

    def _errors(self, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Mean over products of |y - dense y|^2 / |dense y|^2."""
        errors = [(self._seen[n] - y).square().sum() / y.square().sum().clamp(min=1e-12)
                  for n, y in dense.items()]
        self._seen.clear()
        return torch.stack(errors).mean()
