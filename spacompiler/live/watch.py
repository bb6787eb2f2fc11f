"""What importance passes see of a training run: its weights, its gradients, its activations.

Nothing is computed a second time. `gates` and `token_gates` multiply what a consumer was given
by the gradient that the user's own backward sends there; `weight_gradients` are `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from spacompiler.axes import is_frozen
from spacompiler.errors import SpaError, UsageError
from spacompiler.frontends.torch_export import Trace
from spacompiler.groups import Group, Member, Solution
from spacompiler.scores import onto, rows

from .adapter_step import AdapterStep, adapted
from .sites import Site, hook

GATES = ("gates", "token_gates")
KNOWN = (*GATES, "weight_gradients", "adapter_steps")


class Watch:
    """The context of importance passes (`protocols.Context`) inside a training loop."""

    def __init__(self, module: nn.Module, trace: Trace, solution: Solution,
                 found: Iterable[Site], needs: Iterable[str], seed: int = 0) -> None:
        self.solution, self.seed = solution, seed
        self._module, self._trace = module, trace
        self._needs = tuple(needs)
        unknown = sorted(set(self._needs) - set(KNOWN))
        if unknown:
            raise UsageError(
                f"statistic {unknown[0]!r} cannot be had from a training loop",
                fix=f"use an importance pass that needs only {', '.join(KNOWN)}")
        self._gates: dict[tuple[str, str], torch.Tensor] = {}
        self._handles = hook(module, found, self._gate)

    def stop(self) -> None:
        """Take the hooks out of the module."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def clear(self) -> None:
        """Forget what was seen since the last optimiser step."""
        self._gates.clear()

    # --- what a pass may ask ------------------------------------------------------------------

    def stored(self, name: str) -> torch.Tensor:
        """Return the live array of a name of the traced program."""
        program = self._trace.program
        found = program.state_dict.get(name)
        return program.constants[name] if found is None else found  # type: ignore[return-value]

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array as (*group.shape, rest)."""
        return self._rows(self.stored(member.weight).detach(), member, group)

    def gradient_rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return `.grad` of a stored array as (*group.shape, rest); zeros if it is frozen."""
        array = self.stored(member.weight)
        grad = torch.zeros_like(array) if array.grad is None else array.grad
        return self._rows(grad, member, group)

    def gates(self, group: Group) -> torch.Tensor:
        """Return dL/dgate summed over the group's sites since the last step: `group.shape`."""
        return self._seen("gates", group)

    def token_gates(self, group: Group) -> torch.Tensor:
        """Return |dL/dgate| of each example and position, summed: `group.shape`."""
        return self._seen("token_gates", group)

    def adapted(self, member: Member, group: Group, *, eta: float,
                scaled: bool) -> AdapterStep | None:
        """Return the adapters' step on a stored array and its merged value, both as rows.

        None if no adapter with gradients sits on it.
        """
        found = adapted(self._module, member.weight, eta=eta, scaled=scaled)
        return found and AdapterStep(self._rows(found.step, member, group),
                                     self._rows(found.weight, member, group))

    def blind(self, group: Group) -> bool:
        """True if the pass needs gradients of weights and all weights of a group are frozen."""
        return "weight_gradients" in self._needs and all(
            self.stored(m.weight).grad is None for m in group.members)

    def _rows(self, array: torch.Tensor, member: Member, group: Group) -> torch.Tensor:
        return rows(array, self.solution.dims(member.weight), member.dim, group)

    def _seen(self, kind: str, group: Group) -> torch.Tensor:
        have = self._gates.get((kind, group.name))
        if have is None:
            raise SpaError(
                f"no gradient has reached {group.name}",
                why="backward has not run in train mode since the last step, or nothing before "
                    "that layer is trained",
                fix="call backward before the optimiser's step; check requires_grad")
        return have.reshape(group.shape)

    # --- hooks --------------------------------------------------------------------------------

    def _gate(self, site: Site, x: Any) -> Any:
        if torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad:
            given = x.detach()
            x.register_hook(lambda gradient: self._add(site, given, gradient))
        return x

    def _add(self, site: Site, given: torch.Tensor, gradient: torch.Tensor) -> None:
        dims = self.solution.solver.dims[site.tensor]
        product = given.float() * gradient.float()
        product = product.flatten(0, product.ndim - len(dims)) if product.ndim > len(dims) \
            else product.reshape(*[1] * (len(dims) - product.ndim), *product.shape)
        apart = self.solution.graph.tensors[site.tensor].dynamic
        fixed = [d for d, e in enumerate(dims) if d not in apart and is_frozen(e)]
        product = product.sum(fixed, keepdim=True) if fixed else product
        for name, dim in site.reads:
            group = self.solution.groups[name]
            each = onto(product, dims, dim, group)
            for kind in self._needs:
                if kind in GATES:
                    value = (each if kind == "gates" else each.abs()).sum(0)
                    have = self._gates.get((kind, group.name))
                    self._gates[kind, group.name] = value if have is None else have.add_(value)
