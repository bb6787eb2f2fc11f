"""Hand criteria what they need: arrays with the group's axis first, statistics, gradients.

All statistics that criteria need are gathered in one pass over the batches: those of consumers'
inputs (`statistics`) where a consumer reads them, those of gradients by whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from ..errors import SpaError, UsageError, did_you_mean
from ..graph.ir import Node
from ..groups.solution import Group, Member, Solution
from ..system.heap import give_back
from .consumers import Consumer, consumer
from .forward import no_gradients
from .network import GradientSource, Loss, Network, Place, See
from .powers import Powers
from .room import Room
from .slots import by_channel, onto, rows, slots
from .statistics import OF_INPUTS, Covariance, View, forward_only
from .turns import Turns

__all__ = ["Loss", "Scores", "onto", "rows", "slots"]
Then = Callable[[torch.Tensor], torch.Tensor] | None


@dataclass
class Scores:
    """The context that importance passes see, filled by one calibration run.

    `gradients` is None where the network is computed forward only.
    """

    network: Network
    solution: Solution
    seed: int = 0
    gradients: GradientSource | None = None
    room: Room = field(default_factory=Room)
    turns: Turns = field(default_factory=Turns)
    _inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    _consumers: dict[str, list[Consumer]] = field(default_factory=dict)
    _nodes: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gradients is not None:
            self.turns = self.gradients.turns
        self.turns.home("inputs", self._take)
        self._powers = Powers(self.stored, self.solution.dims)

    # --- stored arrays ------------------------------------------------------------------------

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array by its name in the graph; integers (quantised ones) as floats."""
        return self.network.stored(name)

    def expect(self, groups: Sequence[Group]) -> None:
        """Say which groups will be scored: what is alike of them is then taken once."""
        self._powers.expect(groups)

    def powers(self, member: Member, group: Group, p: int) -> tuple[torch.Tensor, float]:
        """Return sum |w|^p of a member: `group.shape`, and how many weights a slice has."""
        return self._powers.of(member, group, p)

    def done(self, group: Group) -> None:
        """Say that a group is scored: its arrays need not stay in memory."""
        getattr(self.network, "done", lambda names: None)(m.weight for m in group.members)

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array as (*group.shape, rest)."""
        return rows(self.stored(member.weight), self.solution.dims(member.weight), member.dim,
                    group)

    def onto(self, values: torch.Tensor, member: Member, group: Group,
             then: Then = None) -> torch.Tensor:
        """Sum values of a stored array's shape onto the group: `group.shape`.

        With `then`, values are summed over each channel of the member first, and `then` applied.
        """
        dims = self.solution.dims(member.weight)
        found = by_channel(values, dims, member.dim, group, then or (lambda sums: sums))
        return found.reshape(group.shape)

    # --- statistics ---------------------------------------------------------------------------

    def gates(self, group: Group) -> torch.Tensor:
        """Return dL/dgate summed over all places where the group is read: `group.shape`."""
        return self.gate("gates", group)

    def token_gates(self, group: Group) -> torch.Tensor:
        """Return, summed over examples and positions, |dL/dgate| of each: `group.shape`."""
        return self.gate("token_gates", group)

    def gate(self, kind: str, group: Group) -> torch.Tensor:
        """Return a statistic of gates (gates, token_gates, fisher, relevance): `group.shape`."""
        return self._backward().gates[kind, group.name].reshape(group.shape)

    def sums(self, kind: str, member: Member, group: Group) -> torch.Tensor:
        """Return a sum over w dL/dw of a member (elements, vectors, element_squares, hessian)."""
        found = self._backward().sums.get((kind, group.name, member))
        return torch.zeros(group.shape, dtype=torch.float64) if found is None \
            else found.reshape(group.shape)

    def gradient(self, kind: str, name: str) -> torch.Tensor:
        """Return weight_gradients, weight_squares or weight_absolutes of a parameter (or 0)."""
        found = self._backward().arrays.get((kind, name))
        return torch.zeros_like(self.stored(name)) if found is None else found

    def gradient_rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return the gradient of a stored array as (*group.shape, rest); zeros if it has none."""
        return rows(self.gradient("weight_gradients", member.weight),
                    self.solution.dims(member.weight), member.dim, group)

    @property
    def batches(self) -> int:
        """Batches that gradients were taken over."""
        return self._backward().batches

    @property
    def examples(self) -> int:
        """Examples that gradients were taken over."""
        return self._backward().examples

    def inputs(self, at: Consumer) -> dict[str, Any]:
        """Return the statistics of what a consumer reads, by name."""
        return self._inputs.get(at.key, {})

    def consumers(self, group: Group) -> list[View]:
        """Return every consumer of a group as a matrix product, with its statistics.

        Raises SpaError if no consumer of the group has weights.
        """
        if not self._consumers_of(group):
            readers = sorted({r.node for r in group.reads})
            raise SpaError(f"no consumer of {group.name} is a product with weights",
                           why=f"it is read by {', '.join(readers[:3]) or 'nothing'}",
                           fix="use a criterion of weights or gradients (magnitude, taylor), or "
                               f"keep the group: --ignore '{group.name}'")
        return [self._view(c, group) for c in self._consumers_of(group)]

    def measurable(self, group: Group) -> bool:
        """True if criteria of what consumers read can score a group."""
        return bool(self._consumers_of(group))

    def _consumers_of(self, group: Group) -> list[Consumer]:
        if group.name not in self._consumers:
            if not self._nodes:
                self._nodes.update((node.name, node) for node in self.solution.graph.nodes)
            nodes = self._nodes
            reads = dict.fromkeys((r.node, r.tensor) for r in group.reads)
            found = {node: consumer(self.solution.graph, nodes[node]) for node, _ in reads}
            self._consumers[group.name] = [
                c for (node, tensor) in reads
                if (c := found[node]) is not None and c.tensor == tensor]
        return self._consumers[group.name]

    def _view(self, at: Consumer, group: Group) -> View:
        weight = at.matrix(self.network.static(at.weight, self.stored))
        return View(at, weight.detach(), self._feature_slots(at, group), group.shape,
                    self._inputs.get(at.key, {}), lambda kind: self.network.static(
                        at.weight, partial(self.gradient, kind)),
                    self.gradients.curvature.get(at.node.name) if self.gradients else None)

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

    def calibrate(self, needs: Iterable[str], batches: Iterable[Any], loss: Loss, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Run over batches of (args, kwargs) once, gathering what is needed for all groups.

        Without statistics of gradients there is no backward pass, and forward stops at the last
        consumer. Raises UsageError for a statistic that there is not.
        """
        wanted = set(needs)
        watched = self._watch(wanted, groups)
        own = self.turns.own(batches)
        if forward_only(wanted):
            for _ in self._observe(own, watched, tick=tick):
                pass
            return
        gradients, see = self._backward(wanted), self._look(watched)
        gradients.prepare(wanted, groups, (
            c for g in groups if "curvature" in wanted for c in self._consumers_of(g)))
        gradients.gather(own, loss, see, _by_node(watched), tick)

    def _observe(self, own: Sequence[Any], watched: Mapping[Place, Sequence[Consumer]], *,
                 together: bool = False, tick: Callable[[], None] = lambda: None,
                 ) -> Iterator[set[Place]]:
        """Show statistics what this process's batches give at places, and yield those."""
        for places in self.network.observe(
                own, self._sizes(watched), self._look(watched), together=together, tick=tick,
                shown=self.turns.done):
            self.turns.finish()
            yield places

    def widen(self, kinds: Iterable[str], batches: Iterable[Any], loss: Loss,
              groups: Sequence[Group]) -> None:
        """Take covariances and curvature, those of `kinds`, over further batches as well.

        They are second moments of what the network meets; other statistics stay as they are.
        """
        wanted = set(kinds) & {"covariance", "curvature"}
        watched = self._places(groups if "covariance" in wanted else ())
        held = self._inputs
        self._inputs = {key: {k: s for k, s in found.items() if k == "covariance"}
                        for key, found in held.items()}
        own = self.turns.own(batches)
        if "curvature" in wanted:
            self._backward(wanted).curve(own, loss, self._look(watched), _by_node(watched))
        else:
            for _ in self._observe(own, watched):
                pass
        self._inputs = held

    def stream(self, needs: Iterable[str], batches: Iterable[Any],
               groups: Sequence[Group]) -> Iterator[Group]:
        """Gather statistics of inputs and yield each group when its own are complete.

        What no later group needs is dropped after each step, so that one block's worth of
        statistics is held at a time.
        """
        watched = self._watch(set(needs), groups)
        waiting = {g.name: {c.key for c in self._consumers_of(g)} for g in groups}
        seen: set[Place] = set()
        done: set[str] = set()
        for places in self._observe(self.turns.own(batches), watched, together=True):
            seen |= places
            done |= {at.key for place in places for at in watched[place]
                     if seen.issuperset(at.places)}
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
        give_back()

    def _backward(self, wanted: Iterable[str] = ()) -> GradientSource:
        """Return who computes gradients. Raises UsageError where nobody does."""
        if self.gradients is not None:
            return self.gradients
        raise no_gradients(wanted)

    def _watch(self, wanted: set[str], groups: Sequence[Group]) -> dict[Place, list[Consumer]]:
        """Make the statistics that are wanted; return where their inputs are read."""
        known = {*OF_INPUTS}
        if not forward_only(wanted):
            known |= self._backward(wanted).kinds
        for name in wanted - known:
            raise UsageError(f"there is no statistic {name!r}",
                             fix=did_you_mean(name, sorted(known)))
        kinds = [kind for kind in OF_INPUTS if kind in wanted]
        found = self._places(groups if kinds else ())
        self._inputs.update({at.key: {kind: self._statistic(kind) for kind in kinds}
                             for own in found.values() for at in own})
        return found

    def _statistic(self, kind: str) -> Any:
        """A statistic of inputs that nothing was added to yet."""
        return Covariance(room=self.room) if kind == "covariance" else OF_INPUTS[kind]()

    def _places(self, groups: Sequence[Group]) -> dict[Place, list[Consumer]]:
        """The first consumer of every input that groups are read from, by its places."""
        found: dict[str, Consumer] = {}
        for group in groups:
            for at in self._consumers_of(group):
                found.setdefault(at.key, at)
        order = {node.name: i for i, node in enumerate(self.solution.graph.nodes)}
        watched: dict[Place, list[Consumer]] = {}
        for at in sorted(found.values(), key=lambda c: order[c.node.name]):
            for place in at.places:
                watched.setdefault(place, []).append(at)
        return watched

    def covariance_bytes(self, groups: Sequence[Group]) -> float:
        """Return at most how many bytes the covariances of all that reads groups take at once."""
        keys = {at.key: at for g in groups for at in self._consumers_of(g)}
        return sum(map(self._covariance_bytes, keys.values()))

    def _covariance_bytes(self, at: Consumer) -> float:
        return 8.0 * _features(self.solution.graph.tensors[at.weight].shape) ** 2

    def _sizes(self, watched: Mapping[Place, Sequence[Consumer]]) -> dict[Place, float]:
        """Bytes of the covariances that are made of what is read at each place."""
        return {place: sum(self._covariance_bytes(at) for at in own
                           if "covariance" in self._inputs.get(at.key, {}))
                for place, own in watched.items()}

    def _look(self, watched: Mapping[Place, Sequence[Consumer]]) -> See:
        """Return what shows statistics what a node reads.

        Examples count as such unless the node reads them mixed. What is read at one place of a
        consumer is held until its other place is reached.
        """
        held: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

        def see(batch: int, node: str, name: str, value: torch.Tensor, examples: int) -> None:
            for at in watched[node, name]:
                found = held.setdefault((batch, at.key), {})
                found[name] = value.detach()
                if len(found) < len(at.places):
                    continue
                x, seen = at.inputs(held.pop((batch, at.key))[at.tensor]), None
                if at.route is not None:
                    x, seen = at.route.deal(x[0], found[at.route.tensor])
                count = examples if seen is None and x.shape[1] % examples == 0 else 1
                for kind, statistic in self._inputs[at.key].items():
                    self.turns.give("inputs", (at.key, kind), *statistic.of(x, count, seen))

        return see

    def _take(self, key: tuple[str, str], *parts: torch.Tensor) -> None:
        """Let a statistic of inputs take in what a batch gives."""
        at, kind = key
        self._inputs[at][kind].take(*parts)


def _by_node(places: Iterable[Place]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for node, tensor in places:
        found.setdefault(node, set()).add(tensor)
    return found


def _features(shape: tuple[int, ...]) -> int:
    """No consumer with a weight of this shape reads more features at once."""
    return max(prod(shape[1:]), shape[0] if shape else 1)
