"""Gradients of many calls in the order of the program: all calls in one segment, then in the next.

Run call by call, forward and backward, a program reads all of its arrays twice for each call, and
in backward they are all there at once. Here the calls advance side by side through a segment (about
a block) whose arrays are fetched once; what enters a segment is kept, and nothing of what it makes.
Backward goes through the segments from the last to the first: each is computed again from what
entered it, call by call, and handed the gradients of what left it. Those are added up in the order
in which one backward pass of the whole adds them, so that all gradients are equal to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from ...evidence.room import Room
from ...store.mapped import let_go
from ...system.heap import give_back
from ..run.recompute import Segment, borders, segments
from ..run.runner import Runner
from .step import hand_on

Ended = Callable[[int, list[Any]], torch.Tensor]
"""(number of the call, its results) -> what is differentiated."""


@dataclass
class Arrays:
    """The stored arrays of one segment, made once for all calls.

    `fetch` returns one by its first name, as it lies; `ready` as it is computed with; gradients of
    those that are `learned` are handed to `take` (name, gradient). Of an array that segments from
    `several[name]` on read, it is the sum over them.
    """

    first: Callable[[str], str]
    fetch: Callable[[str], torch.Tensor]
    ready: Callable[[torch.Tensor], torch.Tensor]
    learned: Container[str]
    take: Callable[[str, torch.Tensor], None]
    room: Room
    several: Mapping[str, int] = field(default_factory=dict)
    segment: int = 0
    call: int = 0
    _made: dict[str, torch.Tensor] = field(default_factory=dict)
    _lying: list[torch.Tensor] = field(default_factory=list)
    _views: dict[str, torch.Tensor] = field(default_factory=dict)
    _later: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def open(self, segment: int) -> None:
        """Let go of the arrays of another segment."""
        self._made.clear()
        self._views.clear()
        let_go(self._lying)
        self._lying.clear()
        self.segment = segment

    def begin(self, call: int) -> None:
        """Compute with them for a call."""
        self.call = call
        self._views.clear()

    def __call__(self, name: str) -> torch.Tensor:
        """Return an array as it is read."""
        name = self.first(name)
        if name not in self._made:
            lying = self.fetch(name).detach()
            self._lying.append(lying)
            made = self._made[name] = self.ready(lying)
            if name in self.learned:
                made.requires_grad_()
                hand_on(made, partial(self._handed, name))
        if name not in self.several or name not in self.learned:
            return self._made[name]
        if name not in self._views:
            self._views[name] = self._made[name].view_as(self._made[name])
        return self._views[name]

    def roots(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Arrays that were read, with gradients that later segments made of them in this call."""
        return [(view, self._later.pop((self.call, name))) for name, view in self._views.items()
                if (self.call, name) in self._later]

    def _handed(self, name: str, gradient: torch.Tensor) -> None:
        if self.several.get(name, self.segment) == self.segment:
            self.take(name, gradient)
        else:
            self._later[self.call, name] = self.room.lay(gradient)


def several(parts: Sequence[Segment], names: Mapping[fx.Node, str]) -> dict[str, int]:
    """Return the first segment that reads an array, for those that more than one reads."""
    at = {node: i for i, part in enumerate(parts) for node in part}
    found: dict[str, set[int]] = {}
    for node, name in names.items():
        found.setdefault(name, set()).update(at[user] for user in node.users if user in at)
    return {name: min(own) for name, own in found.items() if len(own) > 1}


def _whole(parts: Sequence[Segment]) -> list[Segment]:
    """Segments put together where a node of several results is read beyond its own."""
    made: list[Segment] = []
    for part in parts:
        apart = made and any(
            user.target is operator.getitem for node in borders(made[-1])[1]
            for user in node.users if user not in made[-1])
        if apart:
            made[-1] = [*made[-1], *part]
        else:
            made.append(part)
    return made


def handed_on(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values leave a segment of a program."""
    return [node for part in _whole(segments(graph)) for node in borders(part)[1]]


class InOrder:
    """Calls that runners carry out side by side; `turns` goes through their numbers."""

    def __init__(self, graph: fx.Graph, runners: Sequence[Runner], arrays: Arrays,
                 turns: Callable[[], Iterator[int]]) -> None:
        self._runners, self._arrays, self._turns = runners, arrays, turns
        (output,) = graph.find_nodes(op="output")
        self.parts = _whole(segments(graph)) or [[]]
        self.parts[-1] = [*self.parts[-1], output]
        self._borders = [borders(part) for part in self.parts]
        self._alive: list[dict[fx.Node, Any]] = [{} for _ in runners]
        self._slopes: list[dict[fx.Node, torch.Tensor]] = [{} for _ in runners]
        self._graded: set[fx.Node] = set()

    def run(self, ended: Ended, results: int, *, backward: bool) -> Iterator[float]:
        """Carry all out; yields the share that is done. `results` are the last of what is given."""
        last = len(self.parts) - 1
        for alive, runner in zip(self._alive, self._runners, strict=True):
            for node in runner.graph.find_nodes(op="placeholder"):
                runner.step(node)
            alive.update(runner.env)
            runner.env = {}
        order = [*range(last), *reversed(range(0 if backward else last, last + 1))]
        for done, k in enumerate(order, 1):
            self._arrays.open(k)
            for i in self._turns():
                self._arrays.begin(i)
                if done <= last:
                    self._forward(k, i)
                else:
                    self._backward(k, i, ended, results, backward)
            give_back()
            yield done / len(order)
        self._arrays.open(0)

    def _computed(self, k: int, i: int, given: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Compute a segment from what enters it; return what leaves it (or the results)."""
        runner, part = self._runners[i], self.parts[k]
        runner.env = given
        for node in part[:-1]:
            runner.step(node)
        if part[-1].op != "output":
            runner.step(part[-1])
            made = {node: runner.env[node] for node in self._borders[k][1]}
        else:
            made = {part[-1]: runner.run_node(part[-1])}
        runner.env = {}
        return made

    def _forward(self, k: int, i: int) -> None:
        made = self._computed(k, i, self._leaves(k, i))
        for node, value in made.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                self._graded.add(node)
                value = value.detach()
            self._alive[i][node] = self._arrays.room.lay(value) if isinstance(value, torch.Tensor) \
                else value

    def _leaves(self, k: int, i: int) -> dict[fx.Node, Any]:
        """What enters a segment, each by itself where backward is to tell its gradient."""
        alive = self._alive[i]
        return {node: alive[node].detach().requires_grad_() if node in self._graded
                else alive[node] for node in self._borders[k][0]}

    def _backward(self, k: int, i: int, ended: Ended, results: int, backward: bool) -> None:
        """Compute a segment again, and the gradients of what entered it from those of what left."""
        slopes, leaves = self._slopes[i], self._leaves(k, i)
        given, roots = dict(leaves), []
        for node, leaf in leaves.items():
            if node in slopes:  # what later segments made of it comes first in the sum
                given[node] = leaf.view_as(leaf)
                roots.append((given[node], slopes.pop(node)))
        runner = self._runners[i]
        runner.again = k < len(self.parts) - 1
        made = self._computed(k, i, given)
        runner.again = False
        if k == len(self.parts) - 1:
            (found,) = made.values()
            found = list(found)
            value = ended(i, found[len(found) - results:])
            if backward:
                value.backward()  # type: ignore[no-untyped-call]
        else:
            roots += [(made[node], slopes.pop(node)) for node in made
                      if node in slopes and made[node].requires_grad]
            roots += self._arrays.roots()
            if roots:
                torch.autograd.backward([v for v, _ in roots], [g for _, g in roots])
        for node in self._borders[k][1]:
            self._alive[i].pop(node, None)
        for node in leaves.keys() & self._graded:
            if leaves[node].grad is not None:
                slopes[node] = leaves[node].grad
