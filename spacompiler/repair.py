"""Repair what stays: new weights and biases for the consumers of what a plan removes.

A consumer multiplies X (samples, features) by W (outputs, features). A plan takes features away;
a compensation pass sees the second moments of what is left and of what the output should be, and
returns other weights for the kept features (and a bias, where the operator has one). The arrays
change in the traced program, before the proof: the plan does not, and the proof then says that
the dense program with repaired arrays, removed slices read as zero, is the pruned one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .choices import Choices, keep_mask
from .consumers import Consumer, consumer, gain
from .errors import SpaError
from .frontends.torch_export import Trace
from .graph import Ref
from .groups import Group, Solution
from .lockstep import Lockstep

_BIAS = {"aten.addmm": 0, "aten.layer_norm": 3, **dict.fromkeys(
    "aten.linear aten.conv1d aten.conv2d aten.conv3d aten.conv_transpose1d aten.convolution "
    "aten.conv_transpose2d aten.conv_transpose3d".split(), 2)}


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Evidence:
    """Sums over `count` samples of one shared index: x (f,), y (o,), x x' (f, f), x y' (f, o), y'y.

    x is what the consumer reads, y what its product should be.
    """

    count: int
    x: torch.Tensor
    y: torch.Tensor
    gram: torch.Tensor
    cross: torch.Tensor
    squares: float

    def moments(self, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return E[x x'] and E[x y'], of the deviations from the means if `centred`."""
        gram, cross = self.gram / self.count, self.cross / self.count
        if centred:
            x, y = self.x / self.count, self.y / self.count
            gram, cross = gram - torch.outer(x, x), cross - torch.outer(x, y)
        return gram, cross

    def power(self, centred: bool) -> float:
        """Return E[y'y], of the deviation from the mean if `centred`."""
        mean = float((self.y / self.count).square().sum()) if centred else 0.0
        return self.squares / self.count - mean


@dataclass(frozen=True)
class Site:
    """A consumer that loses features: `kept` (shared, features); `bias` is its stored bias."""

    consumer: Consumer
    weight: str
    bias: str | None
    kept: torch.Tensor


def sites(solution: Solution, choices: Choices, among: set[str] | None = None, *,
          every: bool = False) -> tuple[list[Site], list[str]]:
    """Return the consumers that a plan takes features from, in program order, and what is left out.

    Arrays that several operators read (tied ones), products with computed arrays and products of
    nothing (no samples) stay as they are. `among` names the nodes to look at; with `every`,
    consumers that keep all features are sites too, from the first that loses some; for one that
    must stay as it is, the gain of the norm before it is (a head that is tied to an embedding).
    """
    graph = solution.graph
    nodes = {node.name: node for node in graph.nodes}
    readers = Counter(graph.tensors[name].weight or name for node in graph.nodes
                      for name in dict.fromkeys(node.refs()))
    wanted = {read.node for group in solution.groups.values() if group.atom in choices
              for read in group.reads}
    wanted = wanted if among is None else wanted & among
    found: list[Site] = []
    left: list[str] = []
    gains: dict[str, Consumer] = {}
    for node in (n for n in graph.nodes if n.name in wanted or (every and found)):
        at = consumer(graph, nodes[node.name])
        if at is None and node.name in wanted and any(
                graph.tensors[ref].looked for ref in node.refs()):
            left.append(node.title())
        if at is None or 0 in graph.tensors[at.tensor].shape:
            continue
        weight = graph.tensors[at.weight].weight
        kept = _kept(solution, at, choices)
        if kept.all() and not (every and found):
            continue
        if weight is None or any(readers[name] > 1 for name in (weight, *at.views)):
            left.extend([] if kept.all() else [node.title()])
            before = gain(graph, at.tensor) if kept.all() else None
            gains |= {} if before is None else {before.node.name: before}
            continue
        found.append(Site(at, weight, _bias(solution, at, readers), kept))
    for at in gains.values():
        tensor, whole = graph.tensors[at.weight], keep_mask(solution.dims(at.tensor), choices)
        if tensor.weight is not None and tensor.kind == "parameter" and whole.all() \
                and readers[tensor.weight] == 1:
            found.append(Site(at, tensor.weight, _bias(solution, at, readers),
                              torch.ones(*tensor.shape, 1, dtype=torch.bool)))
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda site: order[site.consumer.node.name]), left


def _bias(solution: Solution, at: Consumer, readers: Counter[str]) -> str | None:
    position = _BIAS.get(at.node.op.rsplit(".", 1)[0], _BIAS.get(at.node.op))
    ref = at.node.arg(position, "bias", None) if position is not None else None
    name = solution.graph.tensors[ref.name].weight if isinstance(ref, Ref) else None
    return name if name and readers[name] == 1 and len(solution.dims(name)) == 1 else None


def _kept(solution: Solution, at: Consumer, choices: Choices) -> torch.Tensor:
    """Which features stay, as the consumer sees them: (shared, features)."""
    dims = solution.dims(at.tensor)
    mask = torch.from_numpy(keep_mask(dims, choices))
    dynamic = solution.graph.tensors[at.tensor].dynamic
    for d in dynamic:
        mask = mask.narrow(d, 0, 1)
    shape = [1 if d in dynamic else e.size for d, e in enumerate(dims)]
    return at.inputs(mask.double().expand(shape)).amax(1) > 0.5


@dataclass
class Repairer:
    """Applies a compensation pass to a traced program, site by site."""

    trace: Trace
    solution: Solution
    choices: Choices
    compensation: Any

    def stored(self, name: str) -> torch.Tensor:
        program = self.trace.program
        return (program.state_dict[name] if name in program.state_dict
                else program.constants[name]).detach()

    def weights(self, site: Site, evidence: Sequence[Evidence]) -> tuple[
            torch.Tensor, torch.Tensor | None]:
        """Return a site's repaired array, zero where features go, and its bias; nothing changes.

        Without a compensation pass what stays is as it was.
        """
        old = self.stored(site.weight)
        made = site.consumer.matrix(old).double().clone()
        bias = self.stored(site.bias) if site.bias is not None else None
        if self.compensation is not None:
            made, shift = self._solved(site, made, evidence)
            bias = bias + shift.to(bias.dtype) if bias is not None else None
        made = made * site.kept.unsqueeze(1)
        return site.consumer.array(made.to(old.dtype), tuple(old.shape)), bias

    def of_dense(self, context: Any, site: Site) -> list[Evidence]:
        """Return what the context's covariance says of a site's product in the dense network."""
        covariance = context.inputs(site.consumer)["covariance"]
        matrix = site.consumer.matrix(self.stored(site.weight))
        return [_of_dense(covariance, w, s) for s, w in enumerate(matrix)]

    def one_shot(self, context: Any, batches: Sequence[Any], found: Sequence[Site]) -> None:
        """Repair every site from statistics of the dense network."""
        by_node = {site.consumer.node.name: site for site in found}
        places = {(site.consumer.node.name, site.consumer.tensor) for site in found}
        groups = [g for g in self.solution.groups.values() if g.atom in self.choices
                  and any((r.node, r.tensor) in places for r in g.reads)]
        for group in _with_covariance(context, batches, groups):
            for view in context.consumers(group):
                site = by_node.pop(view.consumer.node.name, None)
                if site is not None:
                    self._repair(site, view.weight, [
                        _of_dense(view.covariance, w, s) for s, w in enumerate(view.weight)])

    def sequential(self, context: Any, batches: Sequence[Any], found: Sequence[Site], *,
                   residual: bool) -> None:
        """Repair site after site, each from what it reads once those before it are repaired.

        The product is fit to the dense one; with `residual`, to the dense sum that it is added
        into, so that what earlier blocks left wrong is made good where it can be. The weights
        that a ridge leads back to are those of the one-shot repair; where data says which samples
        an array meets, others would meet it in the pruned network, and that is the repair.
        """
        dense = Lockstep(self.trace, self.solution, {}, batches, self.stored)
        self.one_shot(context, batches, [s for s in found if s.consumer.route is not None])
        pruned = Lockstep(self.trace, self.solution, self.choices, batches, self.stored)
        for site in (s for s in found if s.consumer.route is None):
            at = site.consumer
            dense.advance(at.node.name)
            pruned.advance(at.node.name)
            weight = at.matrix(self.stored(site.weight))
            gap = self._gap(at, dense, pruned) if residual else None
            reads = dense.reads(at.node.name, at.tensor)
            evidence = _of_pair(at, weight, reads, pruned.reads(at.node.name, at.tensor), gap)
            if not site.kept.all():
                first = self.of_dense(context, site) if "covariance" in context.inputs(at) else \
                    _of_pair(at, weight, reads, reads, None)
                weight = self._solved(site, weight.double(), first)[0]
            # one feature by itself stands in for no other: it needs no leash
            self._repair(site, weight, evidence, again=site.kept.shape[1] > 1)
            for name in filter(None, (site.weight, site.bias)):
                pruned.put(name, self.stored(name))

    def batch_norms(self, batches: Sequence[Any]) -> int:
        """Take the statistics of batch norms anew, one after the other, and return how many."""
        pruned = Lockstep(self.trace, self.solution, self.choices, batches, self.stored)
        done = 0
        for node in self.solution.graph.nodes:
            places = _STATISTICS.get(node.op.rsplit(".", 1)[0])
            names = [name for i in places or () if (name := self._array(node.args[i]))]
            if len(names) < 2:
                continue
            pruned.advance(node.name)
            found = Channels()
            for x in pruned.reads(node.name, node.args[0].name):
                found.add(x)
            for name, value in zip(names, (found.mean, found.variance), strict=True):
                self._put(name, value.to(self.stored(name).dtype))
                pruned.put(name, self.stored(name))
            done += 1
        return done

    def _array(self, ref: Any) -> str | None:
        return self.solution.graph.tensors[ref.name].weight if isinstance(ref, Ref) else None

    def _gap(self, at: Consumer, dense: Lockstep, pruned: Lockstep) -> list[torch.Tensor] | None:
        """Dense minus pruned, of what the consumer's result is added to (a linear layer's)."""
        graph, (out,) = self.solution.graph, at.node.outputs[:1]
        users = [n for n in graph.nodes if out in n.refs()]
        if at.patch or len(users) != 1 or not users[0].op.startswith("aten.add."):
            return None
        others = [name for name in users[0].refs() if name != out]
        if len(others) != 1 or graph.tensors[others[0]].shape != graph.tensors[out].shape:
            return None
        try:
            return [(a - b).flatten(0, -2) for a, b in zip(
                dense.values(others[0]), pruned.values(others[0]), strict=True)]
        except KeyError:  # the other operand comes later
            return None

    def _repair(self, site: Site, weight: torch.Tensor, evidence: list[Evidence], *,
                again: bool = False) -> None:
        made, shift = self._solved(site, weight.double(), evidence, again=again)
        old = self.stored(site.weight)
        self._put(site.weight, site.consumer.array(made.to(old.dtype), tuple(old.shape)))
        if site.bias is not None:
            bias = self.stored(site.bias)
            self._put(site.bias, (bias.double() + shift).to(bias.dtype))

    def _solved(self, site: Site, weight: torch.Tensor,
                evidence: Sequence[Evidence], *,
                again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        solve = getattr(self.compensation, "again" if again else "solve", self.compensation.solve)
        parts = [solve(w, each, kept, has_bias=site.bias is not None)
                 for w, each, kept in zip(weight, evidence, site.kept, strict=True)]
        return torch.stack([w for w, _ in parts]), torch.cat([shift for _, shift in parts])

    def _put(self, name: str, value: torch.Tensor) -> None:
        program = self.trace.program
        home = program.state_dict if name in program.state_dict else program.constants
        home[name] = torch.nn.Parameter(value.contiguous(), requires_grad=False) \
            if isinstance(home[name], torch.nn.Parameter) else value.contiguous()
        self.trace.repaired.add(self.trace.tied.get(name, name))


_STATISTICS = {"aten.batch_norm": (3, 4), "aten._native_batch_norm_legit_no_training": (3, 4)}


@dataclass
class Channels:
    """The mean and variance of a batch norm's input, by channel, over batches."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        """x: (batch, channels, ...)."""
        flat = x.double().transpose(0, 1).flatten(1)
        self.count += flat.shape[1]
        self.total = self.total + flat.sum(1)
        self.squares = self.squares + flat.square().sum(1)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        spread = (self.squares / self.count - self.mean.square()).clamp(min=0)
        return spread * self.count / max(self.count - 1, 1)


def _with_covariance(context: Any, batches: Sequence[Any],
                     groups: Sequence[Any]) -> Iterator[Any]:
    """Yield groups whose statistics are at hand, then the others as theirs are gathered."""
    missing = []
    for group in groups:
        if all("covariance" in view.found for view in context.consumers(group)):
            yield group
        else:
            missing.append(group)
    if missing:
        yield from context.stream({"covariance"}, batches, missing)


def _of_dense(covariance: Any, weight: torch.Tensor, shared: int) -> Evidence:
    x, gram, w = covariance.total[shared], covariance.gram[shared], weight.double()
    cross = gram @ w.T
    seen = max(int(covariance.seen[shared]), 1)
    return Evidence(seen, x, w @ x, gram, cross, float((w.T * cross).sum()))


def _of_pair(at: Consumer, weight: torch.Tensor, dense: list[torch.Tensor],
             pruned: list[torch.Tensor], gap: list[torch.Tensor] | None) -> list[Evidence]:
    """Sum over batches: x as the pruned network has it, y = W x of the dense one (+ the gap)."""
    total: list[Evidence] = []
    for i, (a, b) in enumerate(zip(dense, pruned, strict=True)):
        wanted = at.inputs(a) @ weight.mT
        if gap is not None:
            wanted = wanted + gap[i]
        x = at.inputs(b)
        sums = (x.sum(1), wanted.sum(1), x.mT @ x, x.mT @ wanted)
        for s in range(len(x)):
            parts = [part[s].double() for part in sums]
            squares = float(wanted[s].double().square().sum())
            if i == 0:
                total.append(Evidence(x.shape[1], parts[0], parts[1], parts[2], parts[3], squares))
                continue
            have = total[s]
            have.count += x.shape[1]
            have.squares += squares
            for name, part in zip(("x", "y", "gram", "cross"), parts, strict=True):
                getattr(have, name).add_(part)
    return total


def unbiased(module: nn.Module, solution: Solution, groups: Sequence[Group]) -> list[str]:
    """Return the linear layers and convolutions that read a group and could have a bias."""
    nodes = {node.name: node for node in solution.graph.nodes}
    read = dict.fromkeys(r.node for g in groups for r in g.reads)
    found = []
    for node in (nodes[name] for name in read):
        at = consumer(solution.graph, node)
        weight = solution.graph.tensors[at.weight].weight if at is not None else None
        path = weight.rpartition(".")[0] if weight else ""
        if path and getattr(module.get_submodule(path), "bias", 0) is None \
                and isinstance(module.get_submodule(path), (nn.Linear, *_CONVS)):
            found.append(path)
    return list(dict.fromkeys(found))


def draft(compensation: Any) -> Any:
    """Return a compensation pass's quick stand-in for trying plans out, or the pass itself."""
    return getattr(compensation, "draft", lambda: compensation)()


def repair(trace: Trace, solution: Solution, choices: Choices, compensation: Any, context: Any,
           batches: Sequence[Any], *, must: bool = True) -> list[str]:
    """Let a compensation pass repair a traced program in place; return notes for the user.

    Raises SpaError if it `must` and there is nothing to repair.
    """
    found, left = sites(solution, choices, every=getattr(compensation, "every", False))
    worker = Repairer(trace, solution, choices, compensation)
    if getattr(compensation, "weights", True) is False:
        found, left = [], []
    elif found and getattr(compensation, "sequential", False):
        worker.sequential(context, batches, found, residual=compensation.residual)
    elif found:
        worker.one_shot(context, batches, found)
    renewed = worker.batch_norms(batches) if getattr(compensation, "batch_norm", False) else None
    if must and not found and not renewed:
        raise SpaError(f"repair {compensation.name!r} finds nothing to repair",
                       why="the network has no batch norms" if renewed is not None else
                           f"only {left[0]} reads it, whose weights are computed or used twice"
                           if left else "no stored weights read what the plan removes",
                       fix="use --repair none")
    return [f"not repaired: {where}, whose weights are computed or used twice"
            for where in left[:3]]
