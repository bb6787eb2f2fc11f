"""Gates that know of the refit: what moving a slice would do with the others fit anew.

Under a mask, the consumer of a group computes with W' = W_K + W_P A', A = (H_KK + l I)^-1 H_KP:
the least-squares weights of what stays (K) for what the dense product gave, on a ridge l. A slice
that is out (P) would bring in what the others do not say already, r_P = x_P - x_K A; one that
stays would take away r_K = x_K H_KK^-1[:, u] (H_KK^-1[u, u])^-1 by blocks u. The gradient of its
gate is the sum over samples of (w_u . dL/dy) r_u, w_u of W' where it stays and of W where it is
out: optimal brain surgeon (Hassibi and Stork, 1993) to first order in the loss, in place of
x_u w_u . dL/dy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..evidence.consumers import Consumer
from ..evidence.statistics import Covariance
from ..torch_backend.run.runner import Override
from .folding import products
from .network import Gated, Place, Values


@dataclass
class _Fit:
    """A consumer under a mask: W' (s, o, f), the columns w_u (s, o, f), and, for each group that is
    read there, x -> r (s, f, f) and the slice of each feature that the group's gates move, or -1.
    """

    weight: torch.Tensor
    columns: torch.Tensor
    residuals: list[torch.Tensor]
    slots: list[torch.Tensor]


class _Saved(Protocol):
    """What is kept for the step back."""

    saved_tensors: tuple[torch.Tensor, ...]
    at: Consumer
    fit: _Fit

    def save_for_backward(self, *tensors: torch.Tensor) -> None: ...


class _Attached(torch.autograd.Function):
    """Pass y on as it is; backward, gates are given what their slices would do."""

    @staticmethod
    def forward(ctx: _Saved, y: torch.Tensor, x: torch.Tensor, at: Consumer, fit: _Fit,
                *gates: torch.Tensor) -> torch.Tensor:
        ctx.at, ctx.fit = at, fit
        ctx.save_for_backward(x, *gates)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: _Saved, outer: torch.Tensor) -> tuple[Any, ...]:
        x, *gates = ctx.saved_tensors
        wanted, x = ctx.at.outputs(outer) @ ctx.fit.columns, ctx.at.inputs(x)
        found = []
        for gate, residual, slot in zip(gates, ctx.fit.residuals, ctx.fit.slots, strict=True):
            gains = (wanted * (x @ residual)).sum(1)  # (shared, features)
            here = slot >= 0
            sums = torch.zeros(gate.numel(), dtype=gains.dtype)
            sums.index_add_(0, slot[here], gains[here])
            found.append(sums.reshape(gate.shape).to(gate.dtype))
        return outer, None, None, None, *found


class Refitted:
    """The consumers of groups, refit under masks that change; `damping` is l by the mean diagonal.

    Takes in consumers with a matrix of their own that no data deals samples to; `covariances` are
    those of what they read in the dense network, by key. Others have plain gates.
    """

    def __init__(self, gated: Gated, covariances: Mapping[str, Covariance],
                 damping: float = 0.1) -> None:
        self._gated, self._damping, self._covariances = gated, damping, covariances
        self._nodes = {n.name: n for n in gated.trace.program.graph_module.graph.nodes}
        self._at: dict[Place, Consumer] = {
            place: at for place, at in products(gated.solution, list(gated.places)).items()
            if at.route is None and not at.views and at.key in covariances}
        self._slots = {place: [gated.features(place, at, group)
                               for group, _ in gated.places[place]]
                       for place, at in self._at.items()}
        self._fits: dict[Place, _Fit] = {}

    @property
    def empty(self) -> bool:
        """True if there is no such consumer."""
        return not self._at

    @torch.no_grad()
    def renew(self, kept: Values) -> None:
        """Fit all consumers anew to what stays: one bool a slice, by group."""
        stored = self._gated.trace.program.state_dict
        yes = torch.ones(1, dtype=torch.bool)
        for place, at in self._at.items():
            name = str(self._gated.solution.graph.tensors[at.weight].weight)
            opened = [torch.cat([kept[group.name].reshape(-1), yes])[slot] for (group, _), slot
                      in zip(self._gated.places[place], self._slots[place], strict=True)]
            others = [torch.stack([*opened[:i], *opened[i + 1:], torch.ones_like(opened[i])]).all(0)
                      for i in range(len(opened))]
            slots = [slot.where(other, torch.full_like(slot, -1))
                     for slot, other in zip(self._slots[place], others, strict=True)]
            weight, gram = at.matrix(stored[name].detach()), self._covariances[at.key]
            parts = [_fit(w, g.to(w.dtype) / gram.count, k, [slot[s] for slot in slots],
                          self._damping)
                     for s, (w, g, k) in enumerate(zip(
                         weight, gram.gram, torch.stack(opened).all(0), strict=True))]
            made, columns, residuals = zip(*parts, strict=True)
            self._fits[place] = _Fit(torch.stack(made), torch.stack(columns), [
                torch.stack(each) for each in zip(*residuals, strict=True)], slots)

    def override(self, gates: Values) -> dict[str, Override]:
        """Return, by node, what is computed under the masks, with gradients for gates."""
        return {place[0]: self._override(place, at, [
            gates[group.name] for group, _ in self._gated.places[place]])
            for place, at in self._at.items()}

    def _override(self, place: Place, at: Consumer, gates: list[torch.Tensor]) -> Override:
        node, fit = self._nodes[place[0]], self._fits[place]
        target: Any = node.target
        where = {name: i for i, a in enumerate(node.args) if (name := getattr(a, "name", None))}
        x, w = where[at.tensor], where[at.operand]

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            given = list(args)
            given[w] = at.array(fit.weight, tuple(args[w].shape)).to(args[w].dtype)
            y = target(*given, **kwargs)
            made: torch.Tensor = _Attached.apply(  # type: ignore[no-untyped-call]
                y, args[x].detach(), at, fit, *gates)
            return made

        return run


def _fit(weight: torch.Tensor, gram: torch.Tensor, kept: torch.Tensor,
         slots: Sequence[torch.Tensor],
         damping: float) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """W', the columns, and the residuals, by blocks of each of `slots`, of one shared index."""
    k, p = torch.nonzero(kept).squeeze(1), torch.nonzero(~kept).squeeze(1)
    own = gram[k][:, k]
    own.diagonal().add_(damping * own.diagonal().mean().clamp(min=1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
    by = inverse @ gram[k][:, p]
    made = torch.zeros_like(weight)
    made[:, k] = weight[:, k] + weight[:, p] @ by.T
    columns = weight.clone()
    columns[:, k] = made[:, k]
    residuals = []
    for slot in slots:
        residual = torch.zeros_like(gram)
        residual[p, p] = 1.0
        residual[k.unsqueeze(1), p] = -by
        residual[k.unsqueeze(1), k] = _alone(inverse, slot[k])
        residuals.append(residual)
    return made, columns, residuals


def _alone(inverse: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """H^-1[:, u] (H^-1[u, u])^-1 for every block u of features with one slot: (f, f)."""
    made = torch.zeros_like(inverse)
    order = torch.argsort(slot, stable=True)[int((slot < 0).sum()):]
    _, counts = torch.unique_consecutive(slot[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        which = torch.nonzero(counts == count).squeeze(1)
        index = order[starts[which].unsqueeze(1) + torch.arange(count)]  # (blocks, count)
        blocks = inverse[index.unsqueeze(2), index.unsqueeze(1)]
        found = inverse[:, index.reshape(-1)].reshape(len(inverse), *index.shape)
        solved = torch.einsum("fuc,ucd->fud", found, torch.linalg.inv(blocks))
        made[:, index.reshape(-1)] = solved.reshape(len(inverse), -1)
    return made
