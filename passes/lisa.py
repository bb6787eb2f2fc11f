"""LISA and OwLore: all weights of a few blocks at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from spacompiler.errors import SpaError
from spacompiler.evidence.watching import watched
from spacompiler.train.hooks import Hooks
from spacompiler.train.loop import Training, train
from spacompiler.train.objective import blocks, call
from spacompiler.train.options import Schedule


@dataclass(frozen=True)
class Lisa(Schedule):
    """Train all that lies outside of blocks, and `layers` blocks drawn anew `every` so many steps.

    LISA (2024): Adam holds moments of what trains alone; those of a block go when it is frozen.
    """

    name: ClassVar[str] = "lisa"
    shares: ClassVar[bool] = True
    lr: float = 1e-4
    layers: int = 2
    every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.layers, self.every) < 1:
            raise TypeError("layers and every must be at least 1")

    def run(self, task: Training) -> dict[str, Any]:
        """Train in place. Raises SpaError if there are no repeated blocks."""
        found = [path for path, _ in blocks(task.module)]
        if not found:
            raise SpaError(f"{self.name} finds no blocks to draw from",
                           fix="use --recover full or lora")
        parameters = {n: p for n, p in task.module.named_parameters() if p.is_floating_point()}
        hooks = Live(parameters, found, self.weights(task, found), self.layers, self.every,
                     task.seed)
        facts = train(task, self, parameters, hooks)
        return facts | {"blocks drawn": hooks.drawn}

    def weights(self, task: Training, paths: Sequence[str]) -> torch.Tensor:
        """Return how likely each block is drawn: equally."""
        return torch.ones(len(paths))


@dataclass(frozen=True)
class Owlore(Lisa):
    """Blocks are drawn by their outliers: the share of |W| |X| that is over `outlier` means.

    OwLore (2024): the sampling; its projection of gradients to a low rank is left out.
    """

    name: ClassVar[str] = "owlore"
    outlier: float = 5.0

    def weights(self, task: Training, paths: Sequence[str]) -> torch.Tensor:
        """Return the share of outliers of each block, over its linear layers, on one batch."""
        parts = {name: part for name, part in task.module.named_modules()
                 if isinstance(part, nn.Linear)}
        shares: dict[str, list[float]] = {path: [] for path in paths}

        def see(name: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                out: object) -> None:
            own = next((p for p in paths if name.startswith(f"{p}.")), None)
            if own is not None and args:
                norms = args[0].reshape(-1, args[0].shape[-1]).norm(dim=0)
                scores = part.get_parameter("weight").abs() * norms
                over = scores > self.outlier * scores.mean()
                shares[own].append(float(over.double().mean()))

        with torch.no_grad(), watched(parts, see):
            call(task.module, *task.batches[0])
        found = torch.tensor([sum(s) / max(len(s), 1) for s in shares.values()])
        return found + 1e-6


class Live(Hooks):
    """Freezes all blocks but those drawn; which they are follows from the step's number alone."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], paths: Sequence[str],
                 weights: torch.Tensor, count: int, every: int, seed: int) -> None:
        self._own = [[p for n, p in parameters.items() if n.startswith(f"{path}.")]
                     for path in paths]
        self._weights, self._count = weights.double(), min(count, len(paths))
        self._every, self._seed = every, seed
        self.drawn: list[list[int]] = []
        self._now: list[int] | None = None

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Freeze and thaw where a new draw is due (or the first one of a resumed run)."""
        if self._now is not None and step % self._every:
            return
        draws = torch.Generator().manual_seed(self._seed * 1_000_003 + step // self._every)
        self._now = sorted(torch.multinomial(self._weights, self._count, generator=draws).tolist())
        self.drawn.append(self._now)
        for i, own in enumerate(self._own):
            for p in own:
                p.requires_grad_(i in self._now)
                if i not in self._now:
                    optimizer.state.pop(p, None)
