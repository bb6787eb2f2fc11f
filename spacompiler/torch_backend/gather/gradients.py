"""Statistics of gradients: reduced to what a group needs as soon as backward makes them.

A *gate* is a factor of one on what a consumer reads of a slice, so that its gradient is the sum
of x dL/dx; gates cost the memory of one number per slice (and position). A weight's gradient is
reduced by a hook and dropped before the next one is made, unless it is asked for as an array.
Losses are taken to be means over the examples of a batch, and batches to be of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import SpaError
from ...evidence.calls import Batch, examples, singles
from ...evidence.consumers import Consumer
from ...evidence.network import Loss, Place, Seen
from ...evidence.room import Room
from ...evidence.turns import Turns
from ...groups.solution import Group, Member, Solution
from ..run.recompute import budget
from ..run.runner import Override, OverridingRunner, Reads, widened
from ..trace import Trace
from .curvature import Curvature
from .gates import OF_GATES, Gates
from .relevance import STARTS, rules
from .step import Step, hand_on
from .weight_sums import OF_SINGLE, OF_WEIGHTS, WeightSums

KINDS = OF_GATES | OF_WEIGHTS | {"curvature"}
ANSWERS = 1 << 27
"""Bytes of the network's results that are kept for whoever compares with them later."""


@dataclass
class Gradients:
    """Runs batches forward and backward and holds what was asked for.

    `gates` by (kind, group), `sums` by (kind, group, member), `arrays` by (kind, weight);
    `curvature` by consumer: the sum of g g', g the gradient of the total loss by what it gives,
    (shared, outputs, outputs). `answers` are the first results of the first batches, each with its
    batch, by the identities of its two parts.
    """

    trace: Trace
    solution: Solution
    stored: Callable[[str], torch.Tensor]
    kinds: frozenset[str] = KINDS
    room: Room = field(default_factory=Room)
    turns: Turns = field(default_factory=Turns)
    gates: dict[tuple[str, str], torch.Tensor] = field(init=False)
    sums: dict[tuple[str, str, Member], torch.Tensor] = field(init=False)
    arrays: dict[tuple[str, str], torch.Tensor] = field(init=False)
    curvature: dict[str, torch.Tensor] = field(init=False)
    answers: dict[tuple[int, int], tuple[Batch, torch.Tensor]] = field(default_factory=dict)
    batches: int = 0
    examples: int = 0
    _kinds: set[str] = field(default_factory=set)
    _step: Step = field(default_factory=Step)

    def __post_init__(self) -> None:
        self._gates = Gates(self.solution, self._step, self.turns)
        self._weights = WeightSums(self.solution, self.stored, self._step, self.turns)
        self._curves = Curvature(self._step, self.turns, self.room)
        self.turns.home("examples", self._count)
        self.gates, self.curvature = self._gates.totals, self._curves.totals
        self.sums, self.arrays = self._weights.sums, self._weights.arrays

    def prepare(self, kinds: set[str], groups: Sequence[Group],
                consumers: Iterable[Consumer] = ()) -> None:
        """Say what is to be gathered, for which groups and their consumers."""
        self._kinds = kinds & KINDS
        self._curves.prepare(consumers if "curvature" in kinds else ())
        self._gates.prepare(self._kinds & OF_GATES, groups)
        if self._kinds & OF_WEIGHTS:
            self._weights.prepare(groups)

    def add(self, batch: Batch, loss: Loss, observe: Seen,
            observed: Mapping[str, set[str]]) -> None:
        """Take in one batch, telling `observe` what nodes read at the places in `observed`.

        Kinds that need single examples, second derivatives or relevance run by themselves.
        """
        given, batch = batch, self.trace.where.of(self.trace.labelled(*batch))
        count = self._step.count = examples(*batch)
        self.turns.give("examples", "", torch.tensor(count))
        whole, parts = self._divide()
        watch: dict[str, Any] = {"observe": observe, "observed": observed}
        if whole or (observed and not parts):
            self._run(batch, self._answering(given, loss), whole, **watch)
            self._gates.settle()
            watch = {}
        if parts and count > 1 and not self._varies():
            raise SpaError("this model cannot run single examples of a batch",
                           why="it could be traced for one batch size only",
                           fix="give calibration batches of one example, or use another criterion")
        for one in singles(batch, count) if parts else ():
            self._step.count, self._step.part = 1, 1 / count
            self._run(one, loss, parts, **watch)
            self._gates.settle()
        self._step.part = 1.0
        if "hessian" in self._kinds:
            self._run(batch, loss, {"hessian"})
        for kind in sorted(self._kinds & STARTS.keys()):
            self._step.count = count
            self._run(batch, STARTS[kind], {kind}, override=rules(self.solution.graph, kind))

    def _answering(self, given: Batch, loss: Loss) -> Loss:
        """The loss, which keeps what the network gave where that is little."""
        def kept(results: list[Any], *batch: Any) -> torch.Tensor:
            held = sum(known.nbytes for _, known in self.answers.values())
            for answer in (x for x in results[:1] if isinstance(x, torch.Tensor)):
                if answer.is_floating_point() and held + answer.nbytes <= ANSWERS:
                    self.answers[id(given[0]), id(given[1])] = given, answer.detach().cpu()
            return loss(results, *batch)

        return kept

    def _count(self, key: str, count: torch.Tensor) -> None:
        self.batches += 1
        self.examples += int(count)

    def curve(self, batch: Batch, loss: Loss, observe: Seen,
              observed: Mapping[str, set[str]]) -> None:
        """Add a batch to the curvature, and to nothing else that is gathered here."""
        batch = self.trace.where.of(self.trace.labelled(*batch))
        self._step.count = examples(*batch)
        self._run(batch, loss, {"curvature"}, observe=observe, observed=observed)

    def _varies(self) -> bool:
        graph = self.solution.graph
        return any(graph.tensors[name].dynamic for name in graph.inputs)

    def _divide(self) -> tuple[set[str], set[str]]:
        """Kinds to gather from whole batches and from single examples.

        Where examples are run by themselves anyway, what adds up over them is gathered there.
        """
        own = self._kinds - {"hessian", *STARTS}
        if not own & OF_SINGLE:
            return own, set()
        whole = {"elements", "vectors", "curvature"}
        return own & whole, own - whole

    def _run(self, batch: Batch, loss: Loss, kinds: set[str], *,
             override: Mapping[str, Override] | None = None, observe: Seen | None = None,
             observed: Mapping[str, set[str]] | None = None) -> None:
        """Run one batch forward and backward, gathering some kinds."""
        self._step.kinds = kinds
        observed = observed or {}
        second = "hessian" in kinds
        gated: Container[Place] = self._gates.places if kinds & OF_GATES else ()
        probed = self._curves.probes(self.trace.program) if "curvature" in kinds else {}
        routes = self._curves.routes if probed else set()
        learned, leaves = self._learned(kinds), dict[str, torch.Tensor]()

        def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
            at = (node.name, name)
            if observe and name in observed.get(node.name, ()) and not runner.again:
                observe(node.name, name, value, self._step.count)
            if at in routes:
                self._curves.route(at, value)
            return value * self._gates.gate(at, value) if at in gated else value

        places = {*routes, *(self._gates.places if gated else ())}
        runner = self._runner(
            batch, Reads(_touched(observed, places), touch), {**probed, **(override or {})},
            partial(self._leaf, leaves, learned, not second),
            lean=not second and not kinds & STARTS.keys())
        with torch.enable_grad(), sdpa_kernel(_ATTENTION[second]):
            value = loss(runner.call(*batch), *batch)
            if second:
                self._weights.take_second({n: a for n, a in leaves.items() if n in learned}, value)
            elif gated or learned or probed:
                value.backward()
        runner.close()

    def _learned(self, kinds: set[str]) -> set[str]:
        """Arrays whose gradients some kinds need."""
        if "hessian" in kinds:  # over all parameters, whatever may go
            return {n for n, t in self.solution.graph.weights().items() if t.kind == "parameter"}
        return set(self._weights.members) if kinds & OF_WEIGHTS else set()

    def _runner(self, batch: Batch, reads: Reads, override: Mapping[str, Override],
                weights: Callable[[str], torch.Tensor], *, lean: bool) -> OverridingRunner:
        """A runner of the program; a lean one holds no more than is cheap for backward."""
        traced = (self.trace.args, self.trace.kwargs)
        return OverridingRunner(
            self.trace.program, weights, reads=reads, override=override, where=self.trace.where,
            held=budget(self.solution.graph, traced, batch) if lean else None)

    def _leaf(self, leaves: dict[str, torch.Tensor], learned: Container[str], reduced: bool,
              name: str) -> torch.Tensor:
        """An array as a leaf, made once; a learned one's gradient is `reduced` when it is made."""
        first = self.trace.tied.get(name, name)
        if first not in leaves:
            leaves[first] = self.stored(first).detach()
            if first in learned:  # what is not is widened, and moved, where it is used
                where = self.trace.where
                leaves[first] = widened(where.dtype, where.of(leaves[first]))
                leaves[first].requires_grad_()
                if reduced:
                    hand_on(leaves[first], partial(self._weights.take, first))
        return leaves[first]


_ALL = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_ATTENTION = {False: _ALL, True: [SDPBackend.MATH]}  # only MATH has second derivatives


def _touched(observed: Mapping[str, set[str]], places: Iterable[Place]) -> dict[str, set[str]]:
    """The tensors that are looked at where nodes read them, by node."""
    found = {node: set(names) for node, names in observed.items()}
    for node, name in places:
        found.setdefault(node, set()).add(name)
    return found
