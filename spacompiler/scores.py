"""Hand criteria what they need: arrays with the group's axis first, gradients, gates.

`slots` maps every position of a tensor to the slice of a group it belongs to, so that any
statistic, of a weight or of an activation, sums onto the group in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from .axes import Expr, coordinates, is_frozen
from .consumers import Consumer, consumer
from .frontends.torch_export import Trace
from .groups import Group, Member, Solution
from .runner import Runner
from .statistics import OF_INPUTS, View

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
    _inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _consumers: dict[str, list[Consumer]] = field(default_factory=dict)

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

    def consumers(self, group: Group) -> list[View]:
        """Return every consumer of a group as a matrix product, with its statistics."""
        return [self._view(c, group) for c in self._consumers_of(group)]

    def _consumers_of(self, group: Group) -> list[Consumer]:
        if group.name not in self._consumers:
            nodes = {node.name: node for node in self.solution.graph.nodes}
            reads = dict.fromkeys((r.node, r.tensor) for r in group.reads)
            found = {node: consumer(self.solution.graph, nodes[node]) for node, _ in reads}
            self._consumers[group.name] = [
                c for (node, tensor) in reads
                if (c := found[node]) is not None and c.tensor == tensor]
        return self._consumers[group.name]

    def _view(self, at: Consumer, group: Group) -> View:
        weight = at.matrix(static(self.trace, self.solution, at.weight, self._stored))
        slot = self._feature_slots(at, group)
        return View(at, weight.detach(), slot, group.shape, self._inputs.get(at.key, {}))

    def _feature_slots(self, at: Consumer, group: Group) -> torch.Tensor:
        """The slice of every feature: the slices of an activation, patched as it is."""
        dims = self.solution.dims(at.tensor)
        dim = next(r.dim for r in group.reads if (r.node, r.tensor) == (at.node.name, at.tensor))
        axes, slot = slots(dims, dim, group)
        dynamic = self.solution.graph.tensors[at.tensor].dynamic
        shape = [1 if d in dynamic else e.size for d, e in enumerate(dims)]
        spread = [e.size if d in axes else 1 for d, e in enumerate(dims)]
        values = torch.from_numpy(slot).permute(*np.argsort(np.argsort(axes)).tolist())
        marks = (values.reshape(spread) + 1).double().expand(shape)
        return at.inputs(marks).amax(1).long() - 1

    def gates(self, group: Group) -> torch.Tensor:
        """Return dL/dgate summed over all places where the group is read: `group.shape`."""
        return self._gates["gates", group.name].reshape(group.shape)

    def token_gates(self, group: Group) -> torch.Tensor:
        """Return, summed over examples and positions, |dL/dgate| of each: `group.shape`."""
        return self._gates["token_gates", group.name].reshape(group.shape)

    def calibrate(self, needs: Iterable[str], batches: Iterable[Any], loss: Loss, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Run over batches of (args, kwargs) once, gathering what is needed.

        `gates` and `token_gates` keep one number per slice; `weight_gradients` one array per
        member; statistics of inputs (see `statistics`) what they hold, once per input. Without
        gradients there is no backward pass, and forward stops at the last consumer.
        """
        wanted = set(needs)
        watched = self._watch(wanted, groups)
        if wanted <= OF_INPUTS.keys():
            stops = {node for node, _ in watched}
            for args, kwargs in batches:
                for _ in self._steps(args, kwargs, watched, stops):
                    pass
                tick()
            return
        self._kinds = [kind for kind in ("gates", "token_gates") if kind in wanted]
        self._sites = self._gated(groups) if self._kinds else {}
        stored = self.solution.graph.weights()
        learned = {m.weight for g in groups for m in g.members
                   if "weight_gradients" in wanted and stored[m.weight].kind == "parameter"}
        for args, kwargs in batches:
            self._backward(*self.trace.match(args, kwargs), loss, learned, watched)
            tick()

    def stream(self, needs: Iterable[str], batches: Iterable[Any],
               groups: Sequence[Group]) -> Iterator[Group]:
        """Gather statistics of inputs and yield each group when its own are complete.

        All batches advance together from consumer to consumer; what no later group needs is
        dropped after each step, so that one block's worth of statistics is held at a time.
        """
        watched = self._watch(set(needs), groups)
        waiting = {g.name: {c.key for c in self._consumers_of(g)} for g in groups}
        stops = {node for node, _ in watched}
        runs = [self._steps(args, kwargs, watched, stops) for args, kwargs in batches]
        keys = {node: at.key for (node, _), at in watched.items()}
        done: set[str] = set()
        for node in [n.name for n in self.solution.graph.nodes if n.name in stops]:
            for run in runs:
                next(run)
            done.add(keys[node])
            yield from self._complete(waiting, done, groups)
        yield from (g for g in groups if not self._consumers_of(g))

    def _complete(self, waiting: dict[str, set[str]], done: set[str],
                  groups: Sequence[Group]) -> Iterator[Group]:
        for group in groups:
            if waiting.get(group.name) and waiting[group.name] <= done:
                yield group
                del waiting[group.name]
        held = set().union(*waiting.values())
        for key in done - held:
            self._inputs.pop(key, None)

    def _watch(self, wanted: set[str],
               groups: Sequence[Group]) -> dict[tuple[str, str], Consumer]:
        """The first consumer of every input that statistics are wanted of."""
        kinds = [kind for kind in OF_INPUTS if kind in wanted]
        found: dict[str, Consumer] = {}
        for group in groups if kinds else ():
            for at in self._consumers_of(group):
                found.setdefault(at.key, at)
        order = {node.name: i for i, node in enumerate(self.solution.graph.nodes)}
        self._inputs.update({key: {kind: OF_INPUTS[kind]() for kind in kinds} for key in found})
        return {(at.node.name, at.tensor): at
                for at in sorted(found.values(), key=lambda c: order[c.node.name])}

    def _steps(self, args: tuple[Any, ...], kwargs: dict[str, Any],
               watched: dict[tuple[str, str], Consumer], stops: set[str]) -> Iterator[str]:
        """Run one batch without gradients, pausing at `stops`."""
        args, kwargs = self.trace.match(args, kwargs)
        runner = Runner(self.trace.program, self._stored, touched=_by_node(watched),
                        touch=lambda node, name, value: self._observe(
                            watched[node.name, name], value, _examples(args, kwargs)))
        steps = runner.steps(args, kwargs, stops)
        while True:
            with torch.no_grad():
                node = next(steps, None)
            if node is None:
                return
            yield node

    def _observe(self, at: Consumer, value: torch.Tensor, examples: int) -> torch.Tensor:
        x = at.inputs(value.detach())
        for statistic in self._inputs[at.key].values():
            statistic.add(x, examples if x.shape[1] % examples == 0 else 1)
        return value

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
                  learned: set[str],
                  watched: dict[tuple[str, str], Consumer]) -> None:
        gates: dict[tuple[str, str], torch.Tensor] = {}
        arrays: dict[str, torch.Tensor] = {}

        def touch(node: Any, name: str, value: torch.Tensor) -> torch.Tensor:
            if (node.name, name) in watched:
                self._observe(watched[node.name, name], value, _examples(args, kwargs))
            if (node.name, name) not in self._sites:
                return value
            gate = torch.ones(self._gate_shape(name, value), dtype=value.dtype,
                              requires_grad=True)
            gates[node.name, name] = gate
            return value * gate

        def weights(name: str) -> torch.Tensor:
            first = self.trace.tied.get(name, name)
            if first not in arrays:
                arrays[first] = self._stored(first).requires_grad_(first in learned)
            return arrays[first]

        runner = Runner(self.trace.program, weights, touch=touch,
                        touched=_by_node([*self._sites, *watched]))
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


def _by_node(places: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node, tensor in places:
        found.setdefault(node, set()).add(tensor)
    return found


def _examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Examples in a batch: the first size of its first tensor."""
    leaves = pytree.tree_leaves((args, kwargs))
    return next((v.shape[0] for v in leaves if isinstance(v, torch.Tensor) and v.ndim), 1)


def static(trace: Trace, solution: Solution, name: str,
           stored: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Return the value of a tensor that follows from stored arrays alone."""
    tensor = solution.graph.tensors[name]
    if tensor.weight is not None:
        return stored(tensor.weight)
    nodes = {node.name: node for node in trace.program.graph.nodes}

    def value(node: fx.Node) -> Any:
        known = solution.graph.tensors.get(node.name)
        if known is not None and known.weight is not None:
            return stored(known.weight)
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    with torch.no_grad():
        return value(nodes[name])
