"""What importance passes see of a training run: its weights, its gradients, its activations.

Nothing is computed a second time. Gates multiply what a consumer was given by the gradient that
the user's own backward sends there; statistics of weights are taken from `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from spacompiler.axes.expressions import is_frozen
from spacompiler.errors import SpaError, UsageError
from spacompiler.evidence.protocol import AdapterStep
from spacompiler.evidence.scores import Scores
from spacompiler.evidence.slots import onto, rows
from spacompiler.groups.solution import Group, Member, Solution
from spacompiler.live.adapter_step import adapted
from spacompiler.live.sites import Site, hook
from spacompiler.torch_backend.gather.gradients import Gradients
from spacompiler.torch_backend.gather.weight_sums import SUMS
from spacompiler.torch_backend.run.observe import ProgramNetwork
from spacompiler.torch_backend.trace import Trace

GATES = ("gates", "token_gates")
OF_WEIGHTS = ("weight_gradients", "elements", "vectors")
KNOWN = (*GATES, *OF_WEIGHTS, "adapter_steps")


class Watch(Scores):
    """The context of importance passes inside a training loop, since the last optimiser step.

    `stream` are groups whose weights are frozen: `elements` and `vectors` are then reduced as
    backward makes each weight's gradient, which is freed at once.

    Raises UsageError if a statistic that is needed cannot be had from a training loop.
    """

    def __init__(self, module: nn.Module, trace: Trace, solution: Solution,
                 found: Iterable[Site], needs: Iterable[str], seed: int = 0, *,
                 stream: Sequence[Group] = ()) -> None:
        network = ProgramNetwork(trace)
        super().__init__(network, solution, seed, Gradients(trace, solution, network.stored))
        self.trace, self._module, self._needs = trace, module, tuple(needs)
        unknown = sorted(set(self._needs) - set(KNOWN))
        if unknown:
            raise UsageError(
                f"statistic {unknown[0]!r} cannot be had from a training loop",
                fix=f"use an importance pass that needs only {', '.join(KNOWN)}")
        self._seen: dict[Any, torch.Tensor] = {}
        gated = bool(set(GATES) & set(self._needs))
        self._handles = hook(module, found, self._gate) if gated else []
        self._streamed: list[torch.Tensor] = []
        if stream and set(SUMS) & set(self._needs):
            self._stream(stream)

    def stop(self) -> None:
        """Take the hooks out of the module."""
        for handle in self._handles:
            handle.remove()
        for p in self._streamed:
            p.requires_grad_(False)
        self._handles, self._streamed = [], []

    def clear(self) -> None:
        """Forget what was seen since the last optimiser step."""
        self._seen.clear()

    # --- what a pass may ask ------------------------------------------------------------------

    def live(self, name: str) -> torch.Tensor:
        """Return the live array of a name of the traced program, gradient and all."""
        program = self.trace.program
        found: Any = program.state_dict.get(name)
        return program.constants[name] if found is None else found

    def gate(self, kind: str, group: Group) -> torch.Tensor:
        """Return `gates` or `token_gates` (see `Context`): `group.shape`."""
        have = self._seen.get((kind, group.name))
        if have is None:
            raise SpaError(
                f"no gradient has reached {group.name}",
                why="backward has not run in train mode since the last step, or nothing before "
                    "that layer is trained",
                fix="call backward before the optimiser's step; check requires_grad")
        return have.reshape(group.shape)

    def sums(self, kind: str, member: Member, group: Group) -> torch.Tensor:
        """Return `elements` or `vectors` (see `Context`) of the gradients at hand."""
        have = self._seen.get((kind, group.name, member))
        if have is None:
            gradient = self.gradient("weight_gradients", member.weight)
            have = self._sum(kind, self.stored(member.weight) * gradient, member, group)
        return have.reshape(group.shape)

    def gradient(self, kind: str, name: str) -> torch.Tensor:
        """Return `.grad` of an array; zeros if it is frozen."""
        array = self.live(name)
        return torch.zeros_like(array) if array.grad is None else array.grad

    @property
    def batches(self) -> int:
        """One: what was seen since the last step counts as one batch."""
        return 1

    def adapted(self, member: Member, group: Group, *, eta: float,
                scaled: bool) -> AdapterStep | None:
        """Return the adapters' step on a stored array and its merged value, both as rows.

        None if no adapter with gradients sits on it.
        """
        found = adapted(self._module, member.weight, eta=eta, scaled=scaled)
        dims = self.solution.dims(member.weight)
        return found and AdapterStep(rows(found.step, dims, member.dim, group),
                                     rows(found.weight, dims, member.dim, group))

    def blind(self, group: Group) -> bool:
        """True if the pass needs gradients of weights and all weights of a group are frozen."""
        return bool(set(OF_WEIGHTS) & set(self._needs)) and not self._streamed and all(
            self.live(m.weight).grad is None for m in group.members)

    # --- hooks --------------------------------------------------------------------------------

    def _gate(self, site: Site, x: object) -> Any:
        if torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad:
            given = x.detach()
            x.register_hook(lambda gradient: self._add_gates(site, given, gradient))
        return x

    def _add_gates(self, site: Site, given: torch.Tensor, gradient: torch.Tensor) -> None:
        dims = self.solution.solver.dims[site.tensor]
        product = given.float() * gradient.float()
        product = product.flatten(0, product.ndim - len(dims)) if product.ndim > len(dims) \
            else product.reshape(*[1] * (len(dims) - product.ndim), *product.shape)
        apart = self.solution.graph.tensors[site.tensor].dynamic
        fixed = [d for d, e in enumerate(dims) if d not in apart and is_frozen(e)]
        product = product.sum(fixed, keepdim=True) if fixed else product
        for name, dim in site.reads:
            each = onto(product, dims, dim, self.solution.groups[name])
            for kind in set(GATES) & set(self._needs):
                self._add((kind, name), (each if kind == "gates" else each.abs()).sum(0))

    def _add(self, key: object, value: torch.Tensor) -> None:
        have = self._seen.get(key)
        self._seen[key] = value if have is None else have.add_(value)

    def _sum(self, kind: str, product: torch.Tensor, member: Member,
             group: Group) -> torch.Tensor:
        each, then = SUMS[kind]
        return self.onto(each(product), member, group, then)

    def _stream(self, groups: Sequence[Group]) -> None:
        """Let frozen weights have gradients, for as long as it takes to reduce them."""
        places: dict[str, list[tuple[Member, Group]]] = {}
        for group in groups:
            for member in group.members:
                places.setdefault(member.weight, []).append((member, group))

        def reduce(p: torch.Tensor, at: list[tuple[Member, Group]]) -> None:
            assert p.grad is not None
            product, p.grad = p.detach() * p.grad, None
            for member, group in at:
                for kind in set(SUMS) & set(self._needs):
                    self._add((kind, group.name, member), self._sum(kind, product, member, group))

        for name, at in places.items():
            p = self.live(name)
            if isinstance(p, nn.Parameter) and not p.requires_grad:
                self._streamed.append(p.requires_grad_(True))
                self._handles.append(p.register_post_accumulate_grad_hook(
                    lambda p, at=at: reduce(p, at)))
