"""Hand criteria what they need: arrays with the group's axis first, gradients, gates.

`slots` maps every position of a tensor to the slice of a group it belongs to, so that any
statistic, of a weight or of an activation, sums onto the group in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
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


def onto(values: torch.Tensor, dims: Sequence[Expr], dim: int, group: Group) -> torch.Tensor:
    """Sum a statistic of a tensor onto a group: (rest, slices), `rest` the other dimensions.

    `values` broadcasts to the tensor's shape (dimensions of one were summed before).
    """
    axes, slot = slots(dims, dim, group)
    rest = [d for d in range(values.ndim) if d not in axes]
    shape = [slot.shape[axes.index(d)] if d in axes else values.shape[d]
             for d in range(values.ndim)]
    flat = values.expand(shape).permute(*rest, *axes).reshape(-1, slot.size)
    index = torch.from_numpy(slot.reshape(-1))
    total = torch.zeros(flat.shape[0], prod(group.shape), dtype=torch.float64)
    return total.index_add_(1, index[index >= 0], flat[:, index >= 0].double())


@dataclass
class Scores:
    """The context that importance passes see, filled by one calibration run."""

    trace: Trace
    solution: Solution
    seed: int = 0
    _gates: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    _kinds: list[str] = field(default_factory=list)
    _sites: dict[tuple[str, str], list[tuple[Group, int]]] = field(default_factory=dict)
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
        return self._gates["gates", group.name].reshape(group.shape)

    def token_gates(self, group: Group) -> torch.Tensor:
        """Return, summed over examples and positions, |dL/dgate| of each: `group.shape`."""
        return self._gates["token_gates", group.name].reshape(group.shape)

    def calibrate(self, needs: Iterable[str], batches: Iterable[Any], loss: Loss, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Run forward and backward over batches of (args, kwargs), gathering what is needed.

        `gates` and `token_gates` keep one number per slice; `weight_gradients` one array per
        member.
        """
        wanted = set(needs)
        self._kinds = [kind for kind in ("gates", "token_gates") if kind in wanted]
        self._sites = self._gated(groups) if self._kinds else {}
        gated: dict[str, set[str]] = {}
        for node, tensor in self._sites:
            gated.setdefault(node, set()).add(tensor)
        learned = {m.weight for g in groups for m in g.members} \
            if "weight_gradients" in wanted else set()
        for args, kwargs in batches:
            self._backward(*self.trace.match(args, kwargs), loss, gated, learned)
            tick()

    def _gated(self, groups: Sequence[Group]) -> dict[tuple[str, str], list[tuple[Group, int]]]:
        """Places where groups are read: (node, activation) -> groups and dimensions."""
        found: dict[tuple[str, str], list[tuple[Group, int]]] = {}
        for group in groups:
            for kind in self._kinds:
                self._gates[kind, group.name] = torch.zeros(prod(group.shape), dtype=torch.float64)
            for read in dict.fromkeys((r.node, r.tensor, r.dim) for r in group.reads):
                if not self.solution.graph.tensors[read[1]].static:
                    found.setdefault(read[:2], []).append((group, read[2]))
        return found

    def _backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Loss,
                  gated: dict[str, set[str]], learned: set[str]) -> None:
        gates: dict[tuple[str, str], torch.Tensor] = {}
        arrays: dict[str, torch.Tensor] = {}

        def touch(node: Any, name: str, value: torch.Tensor) -> torch.Tensor:
            gate = torch.ones(self._gate_shape(name, value), dtype=value.dtype,
                              requires_grad=True)
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
            leaves: dict[Any, torch.Tensor] = {
                **gates, **{n: a for n, a in arrays.items() if n in learned}}
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for key, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                self._add(key, gradient)

    def _gate_shape(self, name: str, value: torch.Tensor) -> list[int]:
        """One gate per removable slice; per example and position too if those are told apart."""
        apart = self.solution.graph.tensors[name].dynamic if "token_gates" in self._kinds else ()
        return [n if d in apart or not is_frozen(e) else 1
                for d, (n, e) in enumerate(zip(value.shape, self.solution.solver.dims[name],
                                               strict=True))]

    def _add(self, key: Any, gradient: torch.Tensor) -> None:
        if isinstance(key, str):
            have = self._gradients.get(key)
            self._gradients[key] = gradient if have is None else have.add_(gradient)
            return
        for group, dim in self._sites[key]:
            each = onto(gradient, self.solution.solver.dims[key[1]], dim, group)
            for kind in self._kinds:
                self._gates[kind, group.name] += \
                    each.sum(0) if kind == "gates" else each.abs().sum(0)
