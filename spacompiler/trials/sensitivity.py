"""What moving one unit's count would do to a network that is pruned and repaired already.

The objective is the divergence of its results from the dense network's. A move changes weights of
some consumers, from W to W', and with them what these give by d = (W' - W) x + b' - b. To second
order the divergence then grows by sum g·d + 1/2 sum (f·d)^2 over samples, g the gradient by what
the consumer gives and f that of the log-likelihood of results drawn from the network's own
prediction (Fisher). The first sum is <dL/dW, W' - W>, exact to first order; the second takes f
and x as independent but for their lengths (Kronecker-factored), so that gradients are gathered
once, whatever the number of moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from ..axes.choices import Choices
from ..evidence.calls import Batch
from ..evidence.losses import distance, drawn, first_floating
from ..evidence.scores import Scores
from ..evidence.statistics import Covariance
from ..groups.solution import Solution
from ..plan.problem import Problem
from ..repair.evidence import Compensation, Evidence
from ..repair.repairer import Repairer
from ..repair.sites import Site, sites
from ..torch_backend.run.masks import masks
from ..torch_backend.run.observe import ProgramNetwork
from ..torch_backend.run.runner import Override, OverridingRunner, Reads
from ..torch_backend.trace import Trace

Arrays = tuple[torch.Tensor, torch.Tensor | None]
HELD = 1 << 29
"""Bytes of solved arrays that are kept for measurements that come again."""


class Change(NamedTuple):
    """Growth of the divergence: slope + curvature, to second order."""

    slope: float
    curvature: float


@dataclass
class Seen:
    """Gradients at one consumer, summed over batches.

    By its weights (shared, outputs, features) and bias (shared, outputs), f f' (shared, outputs,
    outputs), and |f|^2, |x|^2, |f|^2 |x|^2 and their number.
    """

    weight: Any = 0.0
    bias: Any = 0.0
    fisher: Any = 0.0
    lengths: Any = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))

    def add(self, x: torch.Tensor, g: torch.Tensor, f: torch.Tensor, positions: int) -> None:
        """x (shared, samples, features), g and f (shared, samples, outputs) of one batch."""
        self.weight = self.weight + (g.mT @ x).cpu()
        self.bias = self.bias + g.sum(1).cpu()
        self.fisher = self.fisher + positions * (f.mT @ f).cpu()
        a, b = (v.square().sum(-1).cpu().double() for v in (f, x))
        self.lengths += torch.stack([a.sum(), b.sum(), (a * b).sum(),
                                     torch.tensor(float(a.numel()), dtype=torch.float64)])

    @property
    def together(self) -> float:
        """E[|f|^2 |x|^2] / (E|f|^2 E|x|^2): 1 if their lengths were independent."""
        f, x, both, count = self.lengths.tolist()
        return both * count / (f * x) if f * x > 0 else 1.0


class Sensitivity:
    """Measures moves from one plan after another; `plan(problem, kept)` turns counts to choices.

    `context` holds the covariance of what every consumer reads in the dense network, `answer` gives
    the dense network's result on a batch.
    """

    def __init__(self, trace: Trace, solution: Solution, context: Scores,
                 compensation: Compensation | None,
                 plan: Callable[[Problem, Mapping[str, int]], Choices],
                 answer: Callable[[Batch], torch.Tensor]) -> None:
        self._trace, self._solution, self._context = trace, solution, context
        self._compensation, self._plan, self._answer = compensation, plan, answer
        self._dense = Repairer(ProgramNetwork(trace), solution, {}, None)
        self._evidence: dict[str, list[Evidence]] = {}
        self._solved: dict[tuple[str, bytes], Arrays] = {}
        self._bytes = 0
        self._nodes = {node.name: node for node in trace.program.graph_module.graph.nodes}

    def changes(self, problem: Problem, kept: Mapping[str, int],
                moves: Mapping[str, Sequence[int]],
                batches: Sequence[Batch]) -> tuple[dict[tuple[str, int], Change], float]:
        """Return {(unit, count): change} and the divergence, a mean over positions.

        Units that are read by anything but products with stored weights are left out.
        """
        choices = self._plan(problem, kept)
        places = self._places(problem)
        made = self._arrays(choices, set(places))
        seen = {name: Seen() for name in places} if moves else {}
        lost = sum(self._batch(choices, places, made, seen, *batch) for batch in batches)
        found = {}
        for unit in problem.units:
            nodes = {r.node for g in unit.groups for r in g.reads}
            for count in moves.get(unit.name, ()) if nodes <= set(places) else ():
                moved = self._plan(problem, {**kept, unit.name: count})
                found[unit.name, count] = self._change(
                    places, made, self._arrays(moved, nodes), seen, nodes, len(batches))
        return found, float(lost) / len(batches)

    def _places(self, problem: Problem) -> dict[str, Site]:
        """Every consumer that some plan of these units could take features from."""
        found, _ = sites(self._solution, self._plan(problem, problem.least()))
        return {site.consumer.node.name: site for site in found
                if site.consumer.route is None and not site.consumer.views}

    def _arrays(self, choices: Choices, among: set[str]) -> dict[str, Arrays]:
        """Repaired weights and biases of the consumers that a plan takes features from."""
        worker = Repairer(self._dense.network, self._solution, choices, self._compensation)
        found, _ = sites(self._solution, choices, among)
        for site in found:
            name = site.consumer.node.name
            if name not in self._evidence and self._compensation is not None:
                self._evidence[name] = self._dense.of_dense(self._context, site)
        return {s.consumer.node.name: self._known(worker, s) for s in found}

    def _known(self, worker: Repairer, site: Site) -> Arrays:
        """Arrays of a consumer, solved once for what it keeps while there is room for them."""
        name = site.consumer.node.name
        key = name, site.kept.numpy().tobytes()
        found = self._solved.get(key)
        if found is None:
            found = worker.weights(site, self._evidence.get(name, ()))
            self._bytes += found[0].numel() * found[0].element_size()
            if self._bytes > HELD:
                self._solved, self._bytes = {}, 0
            self._solved[key] = found
        return found

    def _stored(self, site: Site) -> Arrays:
        stored = self._dense.stored
        return stored(site.weight), stored(site.bias) if site.bias else None

    def _batch(self, choices: Choices, places: Mapping[str, Site], made: Mapping[str, Arrays],
               seen: Mapping[str, Seen], args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """Add one batch's gradients to `seen` (if there is any) and return its divergence."""
        call = self._trace.match(args, kwargs)
        masked = masks(self._solution, choices) if choices else Reads()
        masked = replace(masked, places={
            n: names for n, names in masked.places.items() if n not in places})
        reads: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        override = {name: self._override(site, made.get(name), reads)
                    for name, site in places.items()}
        with torch.no_grad():
            dense = self._answer((args, kwargs))
        runner = OverridingRunner(self._trace.program, reads=masked, override=override,
                                  where=self._trace.where)
        with torch.set_grad_enabled(bool(seen)):
            pruned = first_floating(runner.call(*call))
            lost = distance(pruned, dense.to(pruned.device))
        if seen:
            given = [y for _, y in reads.values()]
            slopes = torch.autograd.grad(lost, given, retain_graph=True)
            likelihood, positions = drawn(pruned)
            fishers = torch.autograd.grad(likelihood, given)
            for (name, (x, _)), g, f in zip(reads.items(), slopes, fishers, strict=True):
                at = places[name].consumer
                seen[name].add(at.inputs(x), at.outputs(g), at.outputs(f), positions)
        return float(lost.detach())

    def _override(self, site: Site, arrays: Arrays | None,
                  reads: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Override:
        at = site.consumer
        node = self._nodes[at.node.name]
        target: Any = node.target
        x = self._position(node, at.tensor)
        where = {self._position(node, at.weight): arrays[0]} if arrays else {}
        if arrays and arrays[1] is not None:
            ref = next(r for r in at.node.refs()
                       if self._solution.graph.tensors[r].weight == site.bias)
            where[self._position(node, ref)] = arrays[1]

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            y = target(*(where[i].to(args[x]) if i in where else a
                         for i, a in enumerate(args)), **kwargs)
            if torch.is_grad_enabled():
                y = y if y.requires_grad else y.detach().requires_grad_()
                reads[node.name] = args[x].detach(), y
            return y

        return run

    @staticmethod
    def _position(node: fx.Node, tensor: str) -> int:
        return next(i for i, a in enumerate(node.args) if getattr(a, "name", None) == tensor)

    def _change(self, places: Mapping[str, Site], made: Mapping[str, Arrays],
                moved: Mapping[str, Arrays], seen: Mapping[str, Seen], nodes: set[str],
                batches: int) -> Change:
        slope = curvature = 0.0
        for name in nodes:
            site, at = places[name], places[name].consumer
            (w0, b0), (w1, b1) = (part.get(name) or self._stored(site) for part in (made, moved))
            by = (at.matrix(w1) - at.matrix(w0)).float()
            shift = (b1 - b0).reshape(len(by), -1) if b0 is not None and b1 is not None else \
                by.new_zeros(by.shape[:2])
            slope += float((seen[name].weight * by).sum() + (seen[name].bias * shift).sum())
            covariance = self._context.inputs(at)["covariance"]
            for s, (d, e) in enumerate(zip(by, shift, strict=True)):
                curvature += seen[name].together * _square(
                    covariance, s, d, e, seen[name].fisher[s]) / 2
        return Change(slope / batches, curvature / batches)


def _square(covariance: Covariance, shared: int, by: torch.Tensor, shift: torch.Tensor,
            fisher: torch.Tensor) -> float:
    """tr(F E[d d']) with d = by x + shift, x as in the covariance; F sums over samples."""
    columns = torch.nonzero(by.abs().amax(0)).squeeze(1)
    mean = (covariance.total[shared] / covariance.count).float()
    moment = covariance.gram[shared][columns][:, columns].float() / covariance.count
    some = by[:, columns]
    off = by @ mean
    total = ((fisher @ some) * (some @ moment)).sum() + 2 * shift @ fisher @ off
    return float(total + shift @ fisher @ shift)

