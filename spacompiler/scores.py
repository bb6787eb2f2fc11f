"""Hand criteria what they need: arrays with the group's axis first, gradients, gates.

`slots` maps every position of a tensor to the slice of a group it belongs to, so that any
statistic, of a weight or of an activation, sums onto the group in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .axes import Expr, coordinates, is_frozen
from .frontends.torch_export import Trace
from .groups import Group, Member, Solution
from .runner import Runner

Loss = Callable[[list[Any], tuple[Any, ...], dict[str, Any]], torch.Tensor]


def slots(dims: Sequence[Expr], dim: int, group: Group) -> tuple[list[int], np.ndarray]:
    """Return the dimensions that decide a position's slice, and the slice at each position.

    The slice is a flat index into `group.shape`; -1 where the group has no coordinate.
    """
    wanted = (*group.outers, group.atom)
    places: dict[int, list[tuple[int, np.ndarray]]] = {}
    for axis, e in enumerate(dims):
        for atom, at in coordinates(e):
            for k, target in enumerate(wanted):
                if atom is target and (axis == dim or k < len(wanted) - 1):
                    places.setdefault(axis, []).append((k, at))
    axes = sorted(places)
    shape = [dims[axis].size for axis in axes]
    total = [np.full(shape, -1) for _ in wanted]
    for i, axis in enumerate(axes):
        spread = [1] * len(axes)
        spread[i] = shape[i]
        for k, at in places[axis]:
            total[k] = np.maximum(total[k], at.reshape(spread))
    flat = np.zeros(shape, dtype=np.int64)
    for k, atom in enumerate(wanted):
        flat = flat * atom.size + total[k]
    missing = np.any([t < 0 for t in total], axis=0)
    return axes, np.where(missing, -1, flat)


def rows(tensor: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group) -> torch.Tensor:
    """Return a tensor with the group's axes first: (*group.shape, rest)."""
    axes, slot = slots(dims, dim, group)
    rest = [d for d in range(tensor.ndim) if d not in axes]
    flat = tensor.permute(*axes, *rest).reshape(slot.size, -1)
    slot = slot.reshape(-1)
    order = np.argsort(slot, kind="stable")[int((slot < 0).sum()):]
    return flat[torch.from_numpy(order)].reshape(*group.shape, -1)


def live_shape(dims: Sequence[Expr]) -> list[int]:
    """Sizes of the dimensions that hold removable slices, one for the others."""
    return [1 if is_frozen(e) else e.size for e in dims]


@dataclass
class Scores:
    """The context that importance passes see, filled by one calibration run."""

    trace: Trace
    solution: Solution
    seed: int = 0
    _gates: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    _gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def _stored(self, name: str) -> torch.Tensor:
        program = self.trace.program
        return (program.state_dict[name] if name in program.state_dict
                else program.constants[name]).detach()

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array as (*group.shape, rest)."""
        return rows(self._stored(member.weight), self.solution.dims(member.weight), member.dim,
                    group)

    def gradient_rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return the gradient of a stored array as (*group.shape, rest); zeros if it has none."""
        array = self._gradients.get(member.weight)
        if array is None:
            array = torch.zeros_like(self._stored(member.weight))
        return rows(array, self.solution.dims(member.weight), member.dim, group)

    def gates(self, group: Group) -> torch.Tensor:
        """Return dL/dgate summed over all places where the group is read: `group.shape`."""
        total = torch.zeros(group.shape, dtype=torch.float64)
        for read in group.reads:
            gate = self._gates.get((read.node, read.tensor))
            if gate is None:
                continue
            dims = self.solution.solver.dims[read.tensor]
            axes, slot = slots(dims, read.dim, group)
            other = [d for d in range(gate.ndim) if d not in axes]
            summed = gate.sum(other) if other else gate
            full = summed.expand(slot.shape).reshape(-1)
            index = torch.from_numpy(slot.reshape(-1))
            total.view(-1).index_add_(0, index[index >= 0], full[index >= 0])
        return total

    def calibrate(self, needs: Iterable[str], batches: Iterable[Any], loss: Loss, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Run forward and backward over batches of (args, kwargs), gathering what is needed.

        `gates` keeps one number per slice and read; `weight_gradients` one array per member.
        """
        wanted = set(needs)
        gated = self._gated(groups) if "gates" in wanted else {}
        learned = {m.weight for g in groups for m in g.members} \
            if "weight_gradients" in wanted else set()
        for args, kwargs in batches:
            self._backward(*self.trace.match(args, kwargs), loss, gated, learned)
            tick()

    def _gated(self, groups: Sequence[Group]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for group in groups:
            for read in group.reads:
                if self.solution.graph.tensors[read.tensor].weight is None:
                    found.setdefault(read.node, set()).add(read.tensor)
        return found

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss,
                  gated: dict[str, set[str]], learned: set[str]) -> None:
        gates: dict[tuple[str, str], torch.Tensor] = {}
        arrays: dict[str, torch.Tensor] = {}

        def touch(node: Any, name: str, value: torch.Tensor) -> torch.Tensor:
            shape = live_shape(self.solution.solver.dims[name])
            gate = torch.ones(shape, dtype=value.dtype, requires_grad=True)
            gates[node.name, name] = gate
            return value * gate

        def weights(name: str) -> torch.Tensor:
            first = self.trace.tied.get(name, name)
            if first not in arrays:
                arrays[first] = self._stored(first).requires_grad_(first in learned)
            return arrays[first]

        runner = Runner(self.trace.program, weights, touched=gated, touch=touch)
        with torch.enable_grad():
            value = loss(runner.call(args, kwargs), args, kwargs)
            leaves = {**gates, **{n: a for n, a in arrays.items() if n in learned}}
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for key, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                self._add(key, gradient)

    def _add(self, key: Any, gradient: torch.Tensor) -> None:
        if isinstance(key, str):
            have = self._gradients.get(key)
            self._gradients[key] = gradient if have is None else have.add_(gradient)
        else:
            have = self._gates.get(key)
            self._gates[key] = gradient.double() if have is None else have.add_(gradient)
