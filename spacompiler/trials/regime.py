"""Two runs of one network beside each other: how alike they compute, and how they are connected.

The three-regime model of pruning (Zhou et al., ICML 2023) reads off two trainings of the pruned
network, by other seeds, whether they were trained too hot or too cold: by the similarity of their
results (CKA) and by the loss on a way from one set of weights to the other (mode connectivity).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import SpaError, UsageError
from ..evidence.calls import Batch
from ..evidence.labels import LABELS, inputs_only
from ..evidence.losses import first_floating, labelled, next_token

Loss = Callable[[list[Any], tuple[Any, ...], dict[str, Any]], torch.Tensor]
State = Mapping[str, torch.Tensor]
ALIKE, NEAR = 0.9, 0.05
"""Results are alike from this CKA on; a way is level that deviates by this share of the loss."""


@dataclass(frozen=True)
class Regime:
    """What two runs say: `cka` of their results, 0 to 1, and `connectivity`, the loss of both (a
    mean) minus the loss of the way between them where these differ most, at `at`.

    `losses` are those on the way, the runs' own at its ends.
    """

    cka: float
    connectivity: float
    at: float
    losses: tuple[float, ...]

    @property
    def advice(self) -> str:
        """What the model says of the temperature (rate over batch size, fewer epochs) of training.

        A barrier between runs that compute differently: train colder. A level way: hotter.
        """
        ends = (self.losses[0] + self.losses[-1]) / 2
        if self.connectivity < -NEAR * abs(ends):
            return "a barrier lies between them: train " + (
                "longer at this temperature" if self.cka >= ALIKE else "colder")
        if self.connectivity > NEAR * abs(ends):
            return "the way between them is better than they are: train longer"
        return "they are connected: " + ("nothing to change" if self.cka >= ALIKE
                                         else "train hotter")


def regime(one: nn.Module, other: nn.Module, batches: Sequence[Batch], *, loss: Loss | None = None,
           steps: int = 0, lr: float = 0.01, points: int = 11, seed: int = 0) -> Regime:
    """Compare two runs of one network on batches of (args, kwargs).

    `loss(results, args, kwargs)` is taken from `labels` among the keywords, or of the next tokens,
    where none is given. The way is straight, or with `steps` a Bezier curve whose bend is trained
    (the mean of both at first) by so many steps at the rate `lr`. Statistics of batch norms are
    mixed as weights are. Raises UsageError without labels or batches, SpaError for two networks.
    """
    ends = [{n: t.detach() for named in (m.named_parameters(), m.named_buffers())
             for n, t in named} for m in (one, other)]
    if [(n, t.shape) for n, t in ends[0].items()] != [(n, t.shape) for n, t in ends[1].items()]:
        raise SpaError("these are not two runs of one network", where=type(other).__name__,
                       why="their arrays differ in name or shape", fix="prune both by one plan")
    if not batches or points < 3:
        raise UsageError("there is nothing to compare on",
                         fix="give batches of (args, kwargs), and three points or more")
    way = _Way(one, ends[0], ends[1], batches, loss or _own_loss)
    bend = way.bent(steps, lr, seed) if steps else None
    losses = [way.loss(way.between(i / (points - 1), bend)) for i in range(points)]
    mean = (losses[0] + losses[-1]) / 2
    far = max(range(points), key=lambda i: abs(mean - losses[i]))
    return Regime(cka(way.results(ends[0]), way.results(ends[1])), mean - losses[far],
                  far / (points - 1), tuple(losses))


def cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return linear CKA of two sets of features, (samples, features) each: 0 to 1.

    |X'Y|² / (|X'X| |Y'Y|) of centred features (Kornblith et al., ICML 2019).
    """
    x, y = (t.double() - t.double().mean(0) for t in (one, other))
    scale = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float((x.T @ y).square().sum() / scale) if scale > 0 else 0.0


@dataclass
class _Way:
    """A way from one state of a network to another."""

    module: nn.Module
    start: State
    end: State
    batches: Sequence[Batch]
    given: Loss

    def between(self, t: float, bend: State | None) -> dict[str, torch.Tensor]:
        """The state at t: on a line, or (1-t)² start + 2t(1-t) bend + t² end."""
        made = {}
        for name, a in self.start.items():
            b = self.end[name]
            if not a.is_floating_point():
                made[name] = a
            elif bend is None or name not in bend:
                made[name] = (1 - t) * a + t * b
            else:
                made[name] = (1 - t) ** 2 * a + 2 * t * (1 - t) * bend[name] + t ** 2 * b
        return made

    def given_by(self, state: State, batch: Batch) -> list[torch.Tensor]:
        """What a state gives for one batch."""
        args, kwargs = batch
        made = torch.func.functional_call(self.module, dict(state), args,
                                          inputs_only(self.module, kwargs))
        return [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]

    @torch.no_grad()
    def loss(self, state: State) -> float:
        """The mean loss of a state over all batches."""
        return sum(float(self.judged(state, b)) for b in self.batches) / len(self.batches)

    def judged(self, state: State, batch: Batch) -> torch.Tensor:
        """The loss of a state on one batch."""
        with _still(self.module):
            return self.given(self.given_by(state, batch), *batch)

    @torch.no_grad()
    def results(self, state: State) -> torch.Tensor:
        """First results of a state on all batches: (samples, features)."""
        with _still(self.module):
            made = [first_floating(self.given_by(state, b)) for b in self.batches]
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in made])

    def bent(self, steps: int, lr: float, seed: int) -> dict[str, torch.Tensor]:
        """Train the bend so that the loss at random points of the curve is least."""
        draws = torch.Generator().manual_seed(seed)
        own = {n for n, _ in self.module.named_parameters()}
        bend = {n: ((a + self.end[n]) / 2).detach().requires_grad_()
                for n, a in self.start.items() if n in own and a.is_floating_point()}
        optimizer = torch.optim.Adam(bend.values(), lr=lr)
        for step in range(steps):
            t = float(torch.rand((), generator=draws))
            optimizer.zero_grad()
            self.judged(self.between(t, bend), self.batches[step % len(self.batches)]).backward()
            optimizer.step()
        return {n: b.detach() for n, b in bend.items()}


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the mode as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _own_loss(made: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy with the batch's labels, or of next tokens."""
    logits = first_floating(made)
    if LABELS in kwargs:
        return labelled(logits, kwargs[LABELS])
    ids = kwargs.get("input_ids")
    if ids is not None and logits.ndim == 3 and logits.shape[:2] == ids.shape:
        return next_token(logits, ids)
    raise UsageError("these batches have no labels",
                     fix="give them among the keywords (labels), or a loss")
