"""Repair what stays: new weights and biases for the consumers of what a plan removes.

A consumer multiplies X (samples, features) by W (outputs, features). A plan takes features away;
a compensation pass sees the second moments of what is left and of what the output should be, and
returns other weights for the kept features (and a bias, where the operator has one). The arrays
change in the network as it was read, before the proof: the plan does not, and the proof then says
that the dense network with repaired arrays, removed slices read as zero, is the pruned one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import isnan
from typing import Any

import torch

from ..axes.choices import Choices
from ..errors import SpaError
from ..evidence.calls import Batch
from ..evidence.scores import Scores
from ..evidence.where import exact
from ..graph.ir import Ref
from ..groups.solution import Group, Solution
from ..system.group import here
from ..system.heap import give_back
from .evidence import Compensation, Evidence, Shared, Told, of_dense, of_pair
from .network import Keeping, Lockstep, Repairable
from .sites import Site, readings, sites

ROUND = 8
"""Layers that begin to seek their ridges at the same one, so that processes can share them: at that
of the last layer of their shape in the round before."""
_Job = tuple[Site, torch.Tensor, list[Evidence]]


@dataclass
class Repairer:
    """Applies a compensation pass to a network, site by site."""

    network: Repairable
    solution: Solution
    choices: Choices
    compensation: Compensation | None
    errors: list[float] = field(default_factory=list)
    _ridges: dict[tuple[int, ...], int | None] = field(default_factory=dict)
    _found: dict[tuple[int, ...], int | None] = field(default_factory=dict)

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array as it is now."""
        return self.network.stored(name)

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
            for each in evidence:  # it is held for other plans: their factors are others
                each.shared.clear()
            bias = bias + shift.to(bias.dtype) if bias is not None else None
        made = made * site.kept.unsqueeze(1)
        return site.consumer.array(made.to(old.dtype), tuple(old.shape)), bias

    def of_dense(self, context: Scores, site: Site) -> list[Evidence]:
        """Return what the context's covariance says of a site's product in the dense network."""
        covariance = context.inputs(site.consumer)["covariance"]
        matrix = site.consumer.matrix(self.stored(site.weight))
        return [of_dense(covariance, w, s) for s, w in enumerate(matrix)]

    def one_shot(self, context: Scores, batches: Sequence[Batch], found: Sequence[Site]) -> None:
        """Repair every site from statistics of the dense network."""
        by_node = {site.consumer.node.name: site for site in found}
        places = {(site.consumer.node.name, site.consumer.tensor) for site in found}
        groups = [g for g in self.solution.groups.values() if g.atom in self.choices
                  and any((r.node, r.tensor) in places for r in g.reads)]
        waiting, number = list[_Job](), count(1)
        for group in _with_covariance(context, batches, groups):
            self._of_group(context, group, by_node, waiting, number)
            give_back()
        self._repair_all(waiting, last=True)

    def _of_group(self, context: Scores, group: Group, by_node: dict[str, Site],
                  waiting: list[_Job], number: Iterator[int]) -> None:
        """Repair the sites that read a group, as soon as each process has one; nothing of their
        statistics is held after it but by those that wait."""
        shared: tuple[object, list[Shared]] = (None, [])
        for view in context.consumers(group):
            site = by_node.pop(view.consumer.node.name, None)
            if shared[0] is not view.covariance:
                shared = view.covariance, [{} for _ in view.weight]
            if site is not None:
                evidence = [of_dense(view.covariance, w, s) for s, w in enumerate(view.weight)]
                for each, own in zip(evidence, shared[1], strict=True):
                    each.shared = own
                waiting.append((site, view.weight, evidence))
                last = next(number) % ROUND == 0
                if len(waiting) == here().size or last:
                    self._repair_all(waiting, last=last)
                    waiting.clear()

    def _repair_all(self, jobs: Sequence[_Job], *, last: bool) -> None:
        """Repair sites, one in each process, and hear the results in their order.

        The `last` of a round let the next ones begin at their ridges.
        """
        team, mine = here(), None
        found, self._found = self._found, {}
        errors, self.errors = self.errors, []
        kept = [self._kept(site) for site, *_ in jobs]
        if team.rank < len(jobs) and kept[team.rank] is None:
            made = self._mended(*jobs[team.rank])
            mine = [([[*self._found.items()], self.errors], made)]
        self._found, self.errors = found, errors
        for at, said in enumerate(team.in_turn(mine, "a layer")):
            if at < len(jobs):
                known = kept[at]
                (ridges, off), arrays = known if known is not None else (said or ())[0]
                self._found.update((tuple(shape), ridge) for shape, ridge in ridges)
                self.errors.extend(off)
                self._put(jobs[at][0], *arrays)
                if known is None and isinstance(self.network, Keeping):
                    self.network.solved(jobs[at][0].consumer.node.name, (ridges, off))
        if last:
            self._ridges.update(self._found)

    def sequential(self, context: Scores, batches: Sequence[Batch], found: Sequence[Site], *,
                   residual: bool) -> None:
        """Repair site after site, each from what it reads once those before it are repaired.

        The product is fit to the dense one; with `residual`, to the dense sum that it is added
        into, so that what earlier blocks left wrong is made good where it can be. The weights
        that a ridge leads back to are those of the one-shot repair; where data says which samples
        an array meets, others would meet it in the pruned network, and that is the repair.
        """
        dense = self.network.lockstep(self.solution, {}, batches)
        self.one_shot(context, batches, [s for s in found if s.consumer.route is not None])
        pruned = self.network.lockstep(self.solution, self.choices, batches)
        for site in (s for s in found if s.consumer.route is None):
            at = site.consumer
            dense.advance(at.node.name)
            pruned.advance(at.node.name)
            weight = at.matrix(self.stored(site.weight))
            gap = self._gap(site, dense, pruned) if residual else None
            reads = dense.reads(at.node.name, at.tensor)
            evidence = of_pair(at, weight, reads, pruned.reads(at.node.name, at.tensor), gap)
            if not site.kept.all():
                first = self.of_dense(context, site) if "covariance" in context.inputs(at) else \
                    of_pair(at, weight, reads, reads, None)
                weight = self._solved(site, weight.double(), first)[0]
                self._ridges.update(self._found)
            # one feature by itself stands in for no other: it needs no leash
            self._repair(site, weight, evidence, again=site.kept.shape[1] > 1)
            for name in filter(None, (site.weight, site.bias)):
                pruned.put(name, self.stored(name))

    def batch_norms(self, batches: Sequence[Batch]) -> int:
        """Take the statistics of batch norms anew, one after the other, and return how many."""
        pruned = self.network.lockstep(self.solution, self.choices, batches)
        readers = readings(self.solution.graph)
        done = 0
        for node in self.solution.graph.nodes:
            places = _STATISTICS.get(node.op.rsplit(".", 1)[0])
            names = [name for i in places or () if (name := self._array(node.args[i]))]
            if len(set(names)) < 2 or any(readers[name] > 1 for name in names):
                continue
            pruned.advance(node.name)
            found = Channels()
            for x in pruned.reads(node.name, node.args[0].name):
                found.add(x)
            for name, value in zip(names, (found.mean, found.variance), strict=True):
                self.network.put(name, value.to(self.stored(name).dtype))
                pruned.put(name, self.stored(name))
            done += 1
        return done

    def _array(self, ref: object) -> str | None:
        return self.solution.graph.tensors[ref.name].weight if isinstance(ref, Ref) else None

    def _gap(self, site: Site, dense: Lockstep, pruned: Lockstep) -> list[torch.Tensor] | None:
        """Dense minus pruned, of what the consumer's result is added to (a linear layer's)."""
        graph, out = self.solution.graph, site.result
        users = [n for n in graph.nodes if out in n.refs()]
        if site.consumer.patch or len(users) != 1 \
                or not users[0].op.startswith(("aten.add.", "Add")):
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
        self._put(site, *self._mended(site, weight, evidence, again=again))
        self._ridges.update(self._found)

    def _kept(self, site: Site) -> tuple[Any, list[torch.Tensor]] | None:
        """What an earlier run found of a site."""
        names = [name for name in (site.weight, site.bias) if name is not None]
        return self.network.known(site.consumer.node.name, names) \
            if isinstance(self.network, Keeping) else None

    def _mended(self, site: Site, weight: torch.Tensor, evidence: list[Evidence], *,
                again: bool = False) -> list[torch.Tensor]:
        """Return a site's new array, and its bias where it has one, in their stored types."""
        made, shift = self._solved(site, weight.double(), evidence, again=again)
        old = self.stored(site.weight)
        arrays = [site.consumer.array(made.to(old.dtype), tuple(old.shape))]
        if site.bias is not None:
            bias = self.stored(site.bias)
            arrays.append((bias.double() + shift).to(bias.dtype))
        return arrays

    def _put(self, site: Site, *arrays: torch.Tensor) -> None:
        for name, array in zip((site.weight, site.bias), arrays, strict=False):
            assert name is not None
            getattr(self.network, "done", lambda names: None)((name,))  # the old one was read
            self.network.put(name, array)

    def _solved(self, site: Site, weight: torch.Tensor,
                evidence: Sequence[Evidence], *,
                again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.compensation is not None
        solve = getattr(self.compensation, "again" if again else "solve", self.compensation.solve)
        shape, parts = tuple(weight.shape), []
        ridge = self._ridges.get(shape)
        for w, each, kept in zip(weight, evidence, site.kept, strict=True):
            each.single = self.stored(site.weight).dtype != torch.float64
            each.told = Told(ridge)
            parts.append(solve(w, each, kept, has_bias=site.bias is not None))
            ridge = self._found[shape] = each.told.ridge
            self.errors.append(each.told.error)
        return torch.stack([w for w, _ in parts]), torch.cat([shift for _, shift in parts])


_STATISTICS = {"aten.batch_norm": (3, 4), "aten._native_batch_norm_legit_no_training": (3, 4),
               "BatchNormalization": (3, 4)}


@dataclass
class Channels:
    """The mean and variance of a batch norm's input, by channel, over batches."""

    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor) -> None:
        """x: (batch, channels, ...)."""
        flat = exact(x).transpose(0, 1).flatten(1)
        self.count += flat.shape[1]
        self.total = self.total + flat.sum(1).cpu()
        self.squares = self.squares + flat.square().sum(1).cpu()

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each channel: (channels,)."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """The unbiased variance of each channel, as batch norms keep it: (channels,)."""
        spread = (self.squares / self.count - self.mean.square()).clamp(min=0)
        return spread * self.count / max(self.count - 1, 1)


def _with_covariance(context: Scores, batches: Sequence[Batch],
                     groups: Sequence[Group]) -> Iterator[Group]:
    """Yield groups whose statistics are at hand, then the others as theirs are gathered."""
    missing = []
    for group in groups:
        if all("covariance" in view.found for view in context.consumers(group)):
            yield group
        else:
            missing.append(group)
    if missing:
        yield from context.stream({"covariance"}, batches, missing)


def draft(compensation: Compensation | None) -> Compensation | None:
    """Return a compensation pass's quick stand-in for trying plans out, or the pass itself."""
    return getattr(compensation, "draft", lambda: compensation)()


def repair(network: Repairable, solution: Solution, choices: Choices, compensation: Compensation,
           context: Scores, batches: Sequence[Batch], *, must: bool = True) -> list[str]:
    """Let a compensation pass repair a network; return notes for the user.

    Raises SpaError if it `must` and there is nothing to repair.
    """
    found, left = sites(solution, choices, every=getattr(compensation, "every", False))
    worker = Repairer(network, solution, choices, compensation)
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
    bare = [site.consumer.node.title() for site in found
            if site.bias is None and getattr(compensation, "create_biases", False)]
    single = [error for error in worker.errors if not isnan(error)]
    return [*([f"{len(single)} of {len(worker.errors)} least squares were solved in float32, off "
               f"by at most {max(single):.0e} of the change"] if single else []),
            *(f"not repaired: {where}, whose weights are computed or used twice"
              for where in left[:3]),
            *(f"no bias to repair: {where} has none and can be given none" for where in bare[:3])]
