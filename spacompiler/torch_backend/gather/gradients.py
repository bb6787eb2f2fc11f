"""Statistics of gradients: reduced to what a group needs as soon as backward makes them.

A *gate* is a factor of one on what a consumer reads of a slice, so that its gradient is the sum
of x dL/dx; gates cost the memory of one number per slice (and position). A weight's gradient is
reduced by a hook and dropped before the next one is made, unless it is asked for as an array.
Losses are taken to be means over the examples of a batch, and batches to be of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import SpaError
from ...evidence.calls import Batch, examples, singles
from ...evidence.consumers import Consumer
from ...evidence.network import Loss, Place, See, Seen
from ...evidence.room import Room
from ...evidence.turns import Turns
from ...groups.solution import Group, Member, Solution
from ..run.recompute import Budget, budget, elements
from ..run.runner import Override, OverridingRunner, Reads, widened
from ..trace import Trace
from .curvature import Curvature
from .gates import OF_GATES, Gates
from .in_order import Arrays, InOrder, handed_on, several
from .relevance import STARTS, rules
from .step import Step, hand_on
from .weight_sums import OF_SINGLE, OF_WEIGHTS, WeightSums

KINDS = OF_GATES | OF_WEIGHTS | {"curvature"}
ANSWERS = 1 << 27
"""Bytes of the network's results that are kept for whoever compares with them later."""

LARGE = 3 << 28
"""Bytes of arrays from which on batches go through a program side by side."""

WHOLE = 1 << 30
"""Bytes of a smaller program's values (views counted, too: half of it is held) that are held for
the backward pass of a batch."""

ABREAST = 1 << 29
"""Bytes of what enters the segments of a program that batches may hold side by side."""


@dataclass(frozen=True)
class Call:
    """A batch of `count` examples, who looks on, and the batch as it was `given`."""

    batch: Batch
    count: int
    observe: Seen
    given: Batch


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

    def gather(self, batches: Sequence[Batch], loss: Loss, see: See,
               observed: Mapping[str, set[str]], tick: Callable[[], None]) -> None:
        """Take in this process's batches, telling `see` what nodes read at places in `observed`.

        Batches go through a model of `LARGE` arrays side by side, unless single examples are asked
        for; kinds that need those, second derivatives or relevance run by themselves.
        """
        calls = [self._call(i, batch, see) for i, batch in enumerate(batches)]
        whole, parts = self._divide()
        if parts or not self._is_large():
            for _ in self._in_turn(calls):
                self._add(calls[self.turns.at], loss, observed)
                tick()
            return
        for i in self._in_turn(calls):
            self._count_in(calls[i])
        if whole or observed:
            self._in_order(calls, loss, whole, observed, tick)
        for i in self._in_turn(calls) if self._kinds & {"hessian", *STARTS} else ():
            self._others(calls[i], loss)

    def curve(self, batches: Sequence[Batch], loss: Loss, see: See,
              observed: Mapping[str, set[str]]) -> None:
        """Add batches to the curvature, and to nothing else that is gathered here."""
        calls = [self._call(i, batch, see) for i, batch in enumerate(batches)]
        if self._is_large():
            self._in_order(calls, loss, {"curvature"}, observed, lambda: None)
            return
        for i in self._in_turn(calls):
            self._run(calls[i], loss, {"curvature"}, observed=observed)

    def _in_order(self, calls: Sequence[Call], loss: Loss, kinds: set[str],
                  observed: Mapping[str, set[str]], tick: Callable[[], None]) -> None:
        """Run calls side by side, as many as fit, forward and backward, gathering some kinds."""
        rounds, many = self.turns.rounds, self._abreast(calls)
        for at in range(0, rounds, many):
            with self.turns.some(min(many, rounds - at)):
                self._side_by_side(calls[at:at + many], loss, kinds, observed, tick)

    def _abreast(self, calls: Sequence[Call]) -> int:
        """How many calls may hold what enters their segments: as many in every process."""
        tensors = self.solution.graph.tensors
        traced = (self.trace.args, self.trace.kwargs)
        entering = sum(prod(tensors[n.name].shape) for n in handed_on(
            self.trace.program.graph_module.graph) if n.name in tensors)
        most = max((elements(call.batch) for call in calls), default=1)
        size = 4 * entering * most / max(1, elements(traced))
        return self.turns.team.of_first(lambda: max(1, int(ABREAST / max(1.0, size))),
                                        "how many batches go side by side")

    def _is_large(self) -> bool:
        return sum(a.nbytes for a in self.trace.program.state_dict.values()) >= LARGE

    def _call(self, number: int, batch: Batch, see: See) -> Call:
        ready = self.trace.where.of(self.trace.labelled(*batch))
        return Call(ready, examples(*ready), partial(see, number), batch)

    def _in_turn(self, calls: Sequence[Call]) -> Iterator[int]:
        """Go through calls, each time until its sums are taken in."""
        for i, call in enumerate(calls):
            self._step.count, self._step.part, self.turns.at = call.count, 1.0, i
            yield i
            self.turns.done()
        self.turns.finish()
        self.turns.at = 0

    def _add(self, call: Call, loss: Loss, observed: Mapping[str, set[str]]) -> None:
        """Take in one batch."""
        self._count_in(call)
        whole, parts = self._divide()
        if whole or (observed and not parts):
            self._run(call, self._answering(call, loss), whole, observed=observed)
            self._gates.settle()
            observed = {}
        if parts and call.count > 1 and not self._varies():
            raise SpaError("this model cannot run single examples of a batch",
                           why="it could be traced for one batch size only",
                           fix="give calibration batches of one example, or use another criterion")
        for one in singles(call.batch, call.count) if parts else ():
            self._step.count, self._step.part = 1, 1 / call.count
            self._run(replace(call, batch=one), loss, parts, observed=observed)
            self._gates.settle()
        self._step.part = 1.0
        self._others(call, loss)

    def _others(self, call: Call, loss: Loss) -> None:
        """Take second derivatives and relevance of one batch."""
        if "hessian" in self._kinds:
            self._run(call, loss, {"hessian"})
        for kind in sorted(self._kinds & STARTS.keys()):
            self._step.count = call.count
            self._run(call, STARTS[kind], {kind}, override=rules(self.solution.graph, kind))

    def _count_in(self, call: Call) -> None:
        self.turns.give("examples", "", torch.tensor(call.count))

    def _answering(self, call: Call, loss: Loss) -> Loss:
        """The loss, which keeps what the network gave where that is little."""
        def kept(results: list[Any], *batch: Any) -> torch.Tensor:
            held = sum(known.nbytes for _, known in self.answers.values())
            for answer in (x for x in results[:1] if isinstance(x, torch.Tensor)):
                if answer.is_floating_point() and held + answer.nbytes <= ANSWERS:
                    key = id(call.given[0]), id(call.given[1])
                    self.answers[key] = call.given, answer.detach().cpu()
            return loss(results, *batch)

        return kept

    def _count(self, key: str, count: torch.Tensor) -> None:
        self.batches += 1
        self.examples += int(count)

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

    def _run(self, call: Call, loss: Loss, kinds: set[str], *,
             override: Mapping[str, Override] | None = None,
             observed: Mapping[str, set[str]] | None = None) -> None:
        """Run one batch forward and backward, gathering some kinds."""
        self._step.kinds = kinds
        second = "hessian" in kinds
        learned, leaves = self._learned(kinds), dict[str, torch.Tensor]()
        traced = (self.trace.args, self.trace.kwargs)
        lean = not second and not kinds & STARTS.keys()
        runner = self._runner(
            call, observed or {}, override or {}, partial(self._leaf, leaves, learned, not second),
            budget(self.solution.graph, traced, call.batch, WHOLE) if lean else None)
        with torch.enable_grad(), sdpa_kernel(_ATTENTION[second]):
            value = loss(runner.call(*call.batch), *call.batch)
            if second:
                self._weights.take_second({n: a for n, a in leaves.items() if n in learned}, value)
            elif self._differentiates(kinds):
                value.backward()
        runner.close()

    def _side_by_side(self, calls: Sequence[Call], loss: Loss, kinds: set[str],
                      observed: Mapping[str, set[str]], tick: Callable[[], None]) -> None:
        """Run calls through the program, all in one segment, then in the next, and back."""
        self._step.kinds = kinds
        where, signature = self.trace.where, self.trace.program.graph_signature
        arrays = Arrays(lambda name: self.trace.tied.get(name, name), self.stored,
                        lambda a: widened(where.dtype, where.of(a)), self._learned(kinds),
                        self._weights.take, Room())
        runners = [self._runner(call, observed, {}, arrays) for call in calls]
        for call, runner in zip(calls, runners, strict=True):
            runner.start(*call.batch)
        graph = self.trace.program.graph_module.graph
        order = InOrder(graph, runners, arrays, partial(self._in_turn, calls))
        arrays.several = several(order.parts, {
            node: arrays.first(str(spec.target)) for node, spec in zip(
                graph.find_nodes(op="placeholder"), signature.input_specs, strict=True)
            if spec.target is not None})

        def ended(i: int, found: list[Any]) -> torch.Tensor:
            return self._answering(calls[i], loss)(found, *calls[i].batch)

        results, told = sum(s.kind.name == "USER_OUTPUT" for s in signature.output_specs), 0
        with torch.enable_grad(), sdpa_kernel(_ATTENTION[False]), \
                self.turns.put_off("gates", len(calls)):
            for share in order.run(ended, results, backward=self._differentiates(kinds)):
                for _ in range(told, int(share * len(calls))):
                    tick()
                told = int(share * len(calls))
            for _ in self._in_turn(calls):
                self._gates.settle()
        for runner in runners:
            runner.close()

    def _differentiates(self, kinds: set[str]) -> bool:
        """Whether some kinds take a gradient of anything."""
        return bool((kinds & OF_GATES and self._gates.places) or self._learned(kinds)
                    or ("curvature" in kinds and self._curves.probes(self.trace.program)))

    def _learned(self, kinds: set[str]) -> set[str]:
        """Arrays whose gradients some kinds need."""
        if "hessian" in kinds:  # over all parameters, whatever may go
            return {n for n, t in self.solution.graph.weights().items() if t.kind == "parameter"}
        return set(self._weights.members) if kinds & OF_WEIGHTS else set()

    def _runner(self, call: Call, observed: Mapping[str, set[str]],
                override: Mapping[str, Override], weights: Callable[[str], torch.Tensor],
                held: Budget | None = None) -> OverridingRunner:
        """A runner of the program, with gates and probes for the kinds that are under way."""
        kinds = self._step.kinds
        gated: Container[Place] = self._gates.places if kinds & OF_GATES else ()
        probed = self._curves.probes(self.trace.program) if "curvature" in kinds else {}
        routes = self._curves.routes if probed else set()

        def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
            at = (node.name, name)
            if name in observed.get(node.name, ()) and not runner.again:
                call.observe(node.name, name, value, self._step.count)
            if at in routes:
                self._curves.route(at, value)
            return self._gates.through(at, value) if at in gated else value

        places = {*routes, *(self._gates.places if gated else ())}
        runner = OverridingRunner(
            self.trace.program, weights, reads=Reads(_touched(observed, places), touch),
            override={**probed, **override}, where=self.trace.where, held=held)
        return runner

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
