"""Statistics of gradients: reduced to what a group needs as soon as backward makes them.

A *gate* is a factor of one on what a consumer reads of a slice, so that its gradient is the sum
of x dL/dx; gates cost the memory of one number per slice (and position). A weight's gradient is
reduced by a hook and dropped before the next one is made, unless it is asked for as an array.
Losses are taken to be means over the examples of a batch, and batches to be of equal size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import networkx as nx
import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ...axes.expressions import is_frozen
from ...errors import SpaError
from ...evidence.calls import Batch, examples
from ...evidence.consumers import Consumer, consumer
from ...evidence.slots import by_channel, onto
from ...graph.idioms import base
from ...graph.ir import Node
from ...groups.solution import Group, Member, Solution
from ..run.recompute import budget
from ..run.runner import Override, OverridingRunner
from ..trace import Trace
from .relevance import largest, rules

Change = Callable[[torch.Tensor], torch.Tensor]


def _as_is(value: torch.Tensor) -> torch.Tensor:
    return value


# kinds of gates: what is added up over examples and positions (fisher: see `_settle`)
GATES: dict[str, Change] = {
    "gates": lambda each: each.sum(0),
    "token_gates": lambda each: each.abs().sum(0),
    "relevance": lambda each: each.abs().sum(0),
}


# kinds of sums over a member's w dL/dw: (on single weights, on the sums of channels)
SUMS: dict[str, tuple[Change, Change]] = {
    "elements": (torch.abs, _as_is), "vectors": (_as_is, torch.abs),
    "element_squares": (torch.square, _as_is), "hessian": (_as_is, _as_is)}
# kinds of whole arrays that are kept, one for each parameter
ARRAYS: dict[str, Change] = {
    "weight_gradients": _as_is, "weight_squares": torch.square,
    "weight_absolutes": torch.abs}
_SINGLE = {"element_squares", "weight_squares", "weight_absolutes"}
KINDS = frozenset({*GATES, "fisher", "curvature", *SUMS, *ARRAYS})


@dataclass
class Gradients:
    """Runs batches forward and backward and holds what was asked for.

    `gates` by (kind, group), `sums` by (kind, group, member), `arrays` by (kind, weight);
    `curvature` by consumer: the sum of g g', g the gradient of the total loss by what it gives,
    (shared, outputs, outputs).
    """

    trace: Trace
    solution: Solution
    stored: Callable[[str], torch.Tensor]
    kinds: frozenset[str] = KINDS
    gates: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    sums: dict[tuple[str, str, Member], torch.Tensor] = field(default_factory=dict)
    arrays: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    curvature: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0
    examples: int = 0
    _kinds: set[str] = field(default_factory=set)
    _sites: dict[tuple[str, str], list[tuple[Group, int]]] = field(default_factory=dict)
    _members: dict[str, list[tuple[Member, Group]]] = field(default_factory=dict)
    _apart: dict[str, torch.Tensor] = field(default_factory=dict)
    _count: int = 1
    _part: float = 1.0
    _running: set[str] = field(default_factory=set)
    _outputs: dict[str, Consumer] = field(default_factory=dict)
    _routes: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def prepare(self, kinds: set[str], groups: Sequence[Group],
                consumers: Iterable[Consumer] = ()) -> None:
        """Say what is to be gathered, for which groups and their consumers."""
        self._kinds = kinds & KINDS
        self._outputs = {c.node.name: c for c in consumers} if "curvature" in kinds else {}
        for group in groups:
            for kind in self._kinds & {*GATES, "fisher"}:
                self.gates[kind, group.name] = torch.zeros(prod(group.shape), dtype=torch.float64)
        if self._kinds & {*GATES, "fisher"}:
            self._sites = self._read_places(groups)
            self._check_apart(groups)
        if self._kinds & {*SUMS, *ARRAYS}:
            kept = self.solution.graph.weights()
            for member, group in ((m, g) for g in groups for m in g.members):
                if kept[member.weight].kind == "parameter":
                    self._members.setdefault(member.weight, []).append((member, group))

    def _read_places(self, groups: Sequence[Group]) -> dict[tuple[str, str],
                                                            list[tuple[Group, int]]]:
        found: dict[tuple[str, str], list[tuple[Group, int]]] = {}
        for group in groups:
            last = self._last_choices(group)
            for read in dict.fromkeys(group.reads):
                array = self.solution.graph.tensors[read.tensor].array
                chosen = read.how == "chosen"
                if read.node in last if chosen and array else not (
                        chosen or array or read.how == "score"):
                    sites = found.setdefault((read.node, read.tensor), [])
                    if (group, read.dim) not in sites:
                        sites.append((group, read.dim))
        return found

    def _last_choices(self, group: Group) -> set[str]:
        """Nodes that look up the last arrays of experts: no product with another one follows.

        An expert whose last arrays are zero gives nothing.
        """
        graph = self.solution.graph
        chosen = {r.node for r in group.reads
                  if r.how == "chosen" and graph.tensors[r.tensor].static}
        meet = {node.name: self._meet(node) for node in graph.nodes if node.name in chosen}
        products = {("op", n.name) for nodes in meet.values() for n in nodes
                    if base(n.op) not in ("add", "sub")}
        flow = graph.to_networkx() if meet else None
        return {name for name, nodes in meet.items() if all(
            products.isdisjoint(nx.descendants(flow, ("op", n.name))) for n in nodes)}

    def _meet(self, node: Node) -> list[Node]:
        """Where an array that a node looks up meets activations: there, or where it is read."""
        graph, (out, *_) = self.solution.graph, node.outputs
        return [n for user in graph.nodes if out in user.refs() for n in self._meet(user)] \
            if graph.tensors[out].looked else [node]

    def _check_apart(self, groups: Sequence[Group]) -> None:
        """Raise SpaError where single examples are to be told apart, and are not."""
        for kind in sorted(self._kinds & {"fisher", "relevance"}):
            for group in groups:
                places = [at for at, found in self._sites.items()
                          if any(g is group for g, _ in found)]
                why = next(filter(None, (self._mixed(kind, *at) for at in places)), "")
                if why:
                    raise SpaError(
                        f"{kind} of {group.name} cannot be gathered",
                        why=f"{why}, so that examples are not told apart",
                        fix="use a criterion that sums over a batch (taylor, magnitude), or keep "
                            f"the group: --ignore '{group.name}'")

    def _mixed(self, kind: str, node: str, tensor: str) -> str:
        """Why examples are mixed in what a node reads, or nothing."""
        graph = self.solution.graph
        if graph.tensors[tensor].static:
            return "its slices are arrays that data chooses"
        at = consumer(graph, next(n for n in graph.nodes if n.name == node))
        if kind == "fisher" and at is not None and at.route is not None and at.route.ends:
            return f"{at.node.title()} reads it in the order of experts"
        return ""

    def add(self, batch: Batch, loss: Callable[..., torch.Tensor],
            observe: Callable[[str, str, torch.Tensor, int], Any],
            observed: Mapping[str, set[str]]) -> None:
        """Take in one batch, telling `observe` what nodes read at the places in `observed`.

        Kinds that need single examples, second derivatives or relevance run by themselves.
        """
        batch = self.trace.labelled(*batch)
        count = self._count = examples(*batch)
        self.batches += 1
        self.examples += count
        whole, parts = self._divide()
        watch: dict[str, Any] = {"observe": observe, "observed": observed}
        if whole or (observed and not parts):
            self._run(batch, loss, whole, **watch)
            self._settle()
            watch = {}
        if parts and count > 1 and not self._varies():
            raise SpaError("this model cannot run single examples of a batch",
                           why="it could be traced for one batch size only",
                           fix="give calibration batches of one example, or use another criterion")
        for one in singles(batch, count) if parts else ():
            self._count, self._part = 1, 1 / count
            self._run(one, loss, parts, **watch)
            self._settle()
        self._part = 1.0
        if "hessian" in self._kinds:
            self._run(batch, loss, {"hessian"})
        if "relevance" in self._kinds:
            self._count = count
            self._run(batch, largest, {"relevance"}, override=rules(self.solution.graph))

    def curve(self, batch: Batch, loss: Callable[..., torch.Tensor],
              observe: Callable[[str, str, torch.Tensor, int], Any],
              observed: Mapping[str, set[str]]) -> None:
        """Add a batch to the curvature, and to nothing else that is gathered here."""
        batch = self.trace.labelled(*batch)
        self._count = examples(*batch)
        self._run(batch, loss, {"curvature"}, observe=observe, observed=observed)

    def _varies(self) -> bool:
        graph = self.solution.graph
        return any(graph.tensors[name].dynamic for name in graph.inputs)

    def _divide(self) -> tuple[set[str], set[str]]:
        """Kinds to gather from whole batches and from single examples.

        Where examples are run by themselves anyway, what adds up over them is gathered there.
        """
        own = self._kinds - {"hessian", "relevance"}
        if not own & _SINGLE:
            return own, set()
        whole = {"elements", "vectors", "curvature"}
        return own & whole, own - whole

    def _run(self, batch: Batch, loss: Callable[..., torch.Tensor], kinds: set[str], *,
             override: Mapping[str, Override] | None = None,
             observe: Callable[[str, str, torch.Tensor, int], Any] | None = None,
             observed: Mapping[str, set[str]] | None = None) -> None:
        self._running = kinds
        observed = observed or {}
        gated = self._sites if kinds & {*GATES, "fisher"} else {}
        learned: Container[str] = self._members if kinds & {*SUMS, *ARRAYS} else ()
        if "hessian" in kinds:  # over all parameters, whatever may go
            learned = {n for n, t in self.solution.graph.weights().items()
                       if t.kind == "parameter"}
        leaves: dict[str, torch.Tensor] = {}

        def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
            if observe and name in observed.get(node.name, ()) and not runner.again:
                observe(node.name, name, value, self._count)
            if (node.name, name) in routes:
                self._routes[node.name, name] = value
            return value * self._gate((node.name, name), value) if (node.name, name) in gated \
                else value

        def weights(name: str) -> torch.Tensor:
            first = self.trace.tied.get(name, name)
            if first not in leaves:
                leaves[first] = self.stored(first).detach()
                if first in learned:
                    leaves[first].requires_grad_()
                    if "hessian" not in kinds:
                        self._hook(leaves[first], partial(self._take, first))
            return leaves[first]

        touched = {node: set(names) for node, names in observed.items()}
        for node, name in gated:
            touched.setdefault(node, set()).add(name)
        traced = (self.trace.args, self.trace.kwargs)
        probed = self._probes() if "curvature" in kinds else {}
        routes = {place for name in probed for place in self._outputs[name].places[1:]}
        for node, name in routes:
            touched.setdefault(node, set()).add(name)
        runner = OverridingRunner(self.trace.program, weights, touched=touched, touch=touch,
                                  override={**probed, **(override or {})},
                                  held=None if kinds & {"hessian", "relevance"} else budget(
                                      self.solution.graph, traced, batch))
        with torch.enable_grad(), sdpa_kernel(_ATTENTION[bool({"hessian"} & kinds)]):
            value = loss(runner.call(*batch), *batch)
            if "hessian" in kinds:
                self._second({n: a for n, a in leaves.items() if n in learned}, value)
            elif gated or learned or probed:
                value.backward()
        runner.close()

    def _probes(self) -> dict[str, Override]:
        """Consumers with a zero added to what they give, whose gradient is taken."""
        targets = {node.name: node.target for node in self.trace.program.graph.nodes}

        def probe(name: str) -> Override:
            def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
                result = targets[name](*args, **kwargs)  # type: ignore[operator]
                zero = torch.zeros_like(result, requires_grad=True)
                self._hook(zero, partial(self._curve, self._outputs[name]))
                return result + zero

            return run

        return {name: probe(name) for name in self._outputs}

    def _curve(self, at: Consumer, gradient: torch.Tensor) -> None:
        g = at.outputs(gradient * self._count)
        if at.route is not None:
            g, _ = at.route.deal(g[0], self._routes[at.places[1]])
        product = (g.mT @ g).double()
        have = self.curvature.get(at.node.name)
        self.curvature[at.node.name] = product if have is None else have.add_(product)

    @staticmethod
    def _hook(leaf: torch.Tensor, take: Callable[[torch.Tensor], None]) -> None:
        def reduce(tensor: torch.Tensor) -> None:
            gradient, tensor.grad = tensor.grad, None
            if gradient is not None:
                take(gradient)

        leaf.register_post_accumulate_grad_hook(reduce)

    # --- gates --------------------------------------------------------------------------------

    def _gate(self, at: tuple[str, str], value: torch.Tensor) -> torch.Tensor:
        """One gate per removable slice; per example and position too if those are told apart."""
        apart = self._running & {"token_gates", "fisher", "relevance"}
        tensor = self.solution.graph.tensors[at[1]]
        if tensor.static:  # of an array there is but one, whatever the examples
            own = {dim for _, dim in self._sites[at]}
            return self._leaf(at, value, [
                n if d in own else 1 for d, n in enumerate(value.shape)])
        dynamic = set(tensor.dynamic) if apart else set()
        if apart and not dynamic and len(value) == self._count:
            dynamic = {0}
        dims = self.solution.solver.dims[at[1]]
        shape = [n if d in dynamic or not is_frozen(e) else 1
                 for d, (n, e) in enumerate(zip(value.shape, dims, strict=True))]
        return self._leaf(at, value, shape)

    def _leaf(self, at: tuple[str, str], value: torch.Tensor, shape: list[int]) -> torch.Tensor:
        gate = torch.ones((), dtype=value.dtype).expand(shape).requires_grad_()
        self._hook(gate, lambda gradient: self._open(at, gradient))
        return gate

    def _open(self, at: tuple[str, str], gradient: torch.Tensor) -> None:
        for group, dim in self._sites[at]:
            each = onto(gradient, self.solution.solver.dims[at[1]], dim, group)
            for kind in self._running & GATES.keys():
                self.gates[kind, group.name] += GATES[kind](each) * self._part
            if "fisher" in self._running:
                own = _fold(each, self._count)
                have = self._apart.get(group.name)
                self._apart[group.name] = own if have is None else have.add_(own)

    def _settle(self) -> None:
        """fisher: square each example's own gradient, `count` times its part of the mean."""
        for name, own in self._apart.items():
            self.gates["fisher", name] += (own * self._count).square().sum(0)
        self._apart.clear()

    # --- weights ------------------------------------------------------------------------------

    def _take(self, name: str, gradient: torch.Tensor) -> None:
        for kind in self._running & ARRAYS.keys():
            value = ARRAYS[kind](gradient)
            value = value * self._part if kind == "weight_gradients" and self._part != 1 else value
            have = self.arrays.get((kind, name))
            self.arrays[kind, name] = value if have is None else have.add_(value)
        sums = self._running & SUMS.keys()
        if sums:
            product = self.stored(name).detach() * gradient
            for member, group in self._members.get(name, ()):
                self._sum(sums, product, member, group)

    def _sum(self, kinds: set[str], product: torch.Tensor, member: Member, group: Group) -> None:
        dims = self.solution.dims(member.weight)
        for kind in kinds:
            each, then = SUMS[kind]
            value = by_channel(each(product), dims, member.dim, group, then)
            have = self.sums.get((kind, group.name, member))
            self.sums[kind, group.name, member] = value if have is None else have.add_(value)

    def _second(self, leaves: dict[str, torch.Tensor], value: torch.Tensor) -> None:
        """H g, from the gradient of <g, g held fixed>."""
        arrays = list(leaves.values())
        first = torch.autograd.grad(value, arrays, create_graph=True, allow_unused=True)
        norm = torch.stack([(g * g.detach()).sum() for g in first if g is not None]).sum()
        try:
            second = torch.autograd.grad(norm, arrays, allow_unused=True)
        except (NotImplementedError, RuntimeError) as problem:
            if "autograd formula" not in str(problem):
                raise
            raise SpaError("the network has no second derivatives",
                           why=str(problem).splitlines()[0],
                           fix="use a criterion of first derivatives (taylor, snip)") from problem
        for name, gradient in zip(leaves, second, strict=True):
            if gradient is not None:
                self._take(name, gradient)


_ALL = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_ATTENTION = {False: _ALL, True: [SDPBackend.MATH]}  # only MATH has second derivatives


def _fold(each: torch.Tensor, count: int) -> torch.Tensor:
    """Add up positions example by example: (count, slices)."""
    if len(each) % count:
        raise ValueError(f"{len(each)} positions are not those of {count} examples")
    return each.reshape(count, -1, each.shape[1]).sum(1)


def singles(batch: Batch, count: int) -> Iterator[Batch]:
    """Yield the examples of a batch as batches of one."""

    def one(i: int, value: object) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
            return value[i : i + 1]
        return value

    for i in range(count):
        yield pytree.tree_map(lambda v, i=i: one(i, v), batch)
