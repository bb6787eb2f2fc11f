"""Measurements that allocation passes may ask for, made only when they are asked for.

Error curves say what a group costs by itself; these say what whole blocks do to the hidden state,
and what moving one group's count does once all of them are pruned and repaired together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import pi
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..axes.choices import Choices, keep_mask
from ..axes.expressions import ONE
from ..errors import SpaError
from ..evidence.calls import Batch, again
from ..evidence.labels import inputs_only
from ..evidence.losses import first_floating
from ..evidence.scores import Scores
from ..evidence.watching import watched
from ..graph.idioms import base
from ..groups.repeats import block
from ..plan.problem import Problem
from ..repair.evidence import Compensation
from ..repair.repairer import Repairer, draft
from ..repair.sites import sites
from ..system.group import here
from ..torch_backend.run.masks import Mixed, masks, side_by_side
from ..torch_backend.run.observe import ProgramNetwork
from ..torch_backend.run.runner import Override, OverridingRunner, Reads
from ..torch_backend.trace import Trace
from .compared import Arrays, Compared
from .sensitivity import Change, Sensitivity


@dataclass
class Measure(Compared):
    """What is measured on a torch module, by its traced program and by the module itself."""

    module: nn.Module
    trace: Trace
    context: Scores
    compensation: Compensation | None
    beside: Sequence[Batch] = ()
    _blocks: dict[frozenset[tuple[str, int]], dict[str, tuple[float, float]]] = field(
        default_factory=dict)
    _sensible: dict[bool, Sensitivity] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take the dense network's results from calibration, which ran the same program."""
        if here().size == 1:  # what one of several ran the others have not
            known = getattr(getattr(self.context, "gradients", None), "answers", {})
            self._answers.update({key: answer for key, (_, answer) in known.items()})

    def results(self, batch: Batch, choices: Choices | None = None,
                arrays: Arrays | None = None) -> list[torch.Tensor]:
        """Return the results of a batch; see `Compared`."""
        reads = masks(self.solution, choices) if choices else None
        return self._run(batch, reads=reads, arrays=arrays or {})

    def abreast(self, batch: Batch, plans: Sequence[Choices]) -> list[torch.Tensor]:
        """Return the first results of a batch of one example under each plan, in one run.

        One after the other where what is read does not go example by example.
        """
        reads = side_by_side(self.solution, [masks(self.solution, choices) for choices in plans])
        try:
            many = again(self.trace.match(*batch), len(plans), self._by_example())
            found = first_floating(self._run(many, reads=reads, arrays={}))
        except (Mixed, RuntimeError, ValueError):  # what is read does not go example by example
            return super().abreast(batch, plans)
        return list(found.split(1)) if len(found) == len(plans) else super().abreast(batch, plans)

    def _by_example(self) -> list[bool]:
        """Whether the first size of each input is the number of examples."""
        graph = self.trace.graph
        return [0 in graph.tensors[name].dynamic for name in graph.inputs]

    def _run(self, batch: Batch, *, reads: Reads | None = None, arrays: Arrays,
             override: Mapping[str, Override] | None = None) -> list[torch.Tensor]:
        runner = OverridingRunner(
            self.trace.program, self._weights(arrays) if arrays else None, reads=reads,
            override=override, where=self.trace.where)
        found = runner.call(*self.trace.match(*batch))
        return [x.cpu() if isinstance(x, torch.Tensor) else x for x in found]

    def _weights(self, arrays: Arrays) -> Callable[[str], torch.Tensor]:
        """Stored arrays but for some, those that are tied to them likewise."""
        program, tied = self.trace.program, self.trace.tied
        held = {**program.state_dict, **program.constants}
        moved = {tied.get(name, name): value for name, value in arrays.items()}
        return lambda name: moved.get(tied.get(name, name), held[name])

    def repaired(self, problem: Problem, choices: Choices) -> Arrays:
        """Return what the repair, if any, would make of the consumers that lose features."""
        if self.compensation is None or not getattr(self.compensation, "weights", True):
            return {}
        context, made = self._covariances(problem), dict[str, torch.Tensor]()
        worker = Repairer(ProgramNetwork(self.trace), self.solution, choices,
                          draft(self.compensation))
        for site in sites(self.solution, choices)[0]:
            weight, bias = worker.weights(site, worker.of_dense(context, site))
            made[site.weight] = weight
            if bias is not None and site.bias:
                made[site.bias] = bias
        return made

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array of the traced program."""
        return self.trace.program.state_dict[name].detach()

    def called(self, batch: Batch) -> Batch:
        """Return a batch in the traced form, its labels after all that the program reads."""
        return self.trace.labelled(*batch)

    def blocks(self, problem: Problem,
               kept: Mapping[str, int] | None = None) -> dict[str, tuple[float, float]]:
        """Return, per unit, of the repeated block that holds it: the mean angle / pi between
        hidden states before and after, and their mean cosine (averaged over a unit's groups).

        With counts `kept`, of the network in which what goes reads as zero.
        """
        choices = self.plan(problem, kept) if kept else {}
        key = frozenset((kept or {}).items()) if choices else frozenset()
        if key not in self._blocks:
            paths = {path for g in self.solution.groups.values() if (path := block(g.name))}
            self._blocks[key] = angles(self.module, sorted(paths), self.batches,
                                       self._emptied(choices))
        found, known = {}, self._blocks[key]
        for unit in problem.units:
            own = [known[path] for g in unit.groups if (path := block(g.name)) in known]
            if own:
                found[unit.name] = tuple(sum(v) / len(own) for v in zip(*own, strict=True))
        if not found:
            raise SpaError("no repeated blocks were found", where=type(self.module).__name__,
                           why="this allocation compares the blocks of a list of modules",
                           fix="use another allocation")
        return found

    def _emptied(self, choices: Choices) -> dict[str, torch.Tensor]:
        """The arrays that read what goes, zero where they do: the module's own, masked."""
        made: dict[str, torch.Tensor] = {}
        for group in self.solution.groups.values() if choices else ():
            for m in group.members if group.atom in choices else ():
                if m.role == "consumer":
                    dims = self.solution.dims(m.weight)
                    mask = keep_mask([e if d == m.dim else ONE for d, e in enumerate(dims)],
                                     choices)
                    have = made.get(m.weight, self.stored(m.weight))
                    made[m.weight] = torch.where(torch.from_numpy(mask), have, 0)
        return made

    @torch.no_grad()
    def renewed(self, problem: Problem, kept: Mapping[str, int], batches: int) -> float:
        """Return the loss of the network in which what goes reads as zero, batch norms by the
        statistics of each batch; a mean over the first `batches`."""
        reads = masks(self.solution, self.plan(problem, kept))
        anew = {node.name: how for node in self.solution.graph.nodes
                if (how := _BY_BATCH.get(base(node.op))) is not None}
        some, total = self.batches[:batches], 0.0
        for batch in some:
            made = self._run(batch, reads=reads, arrays={}, override=anew)
            total += float(self.loss(made, *self.called(batch)))
        return total / len(some)

    def diverges(self, problem: Problem, kept: Mapping[str, int], batches: int,
                 skip: int = 0) -> float:
        """Return the divergence of the network as it is repaired, as `lost` does without.

        It is no stand-in of the repair: a ridge that it seeks is sought. One forward pass a batch:
        results of the dense network, and what the repair found for the same counts of a consumer's
        features, are kept. Every other batch is the model's own text where it wrote some.
        """
        if self.compensation is None or not getattr(self.compensation, "weights", True):
            return self.lost(problem, kept, batches, skip)
        own = self.beside[: batches // 2]
        some = [batch for pair in zip(self.batches, own, strict=False) for batch in pair]
        some += self.batches[len(own): batches - len(own)]
        return self._sensitivity(problem, quick=False).changes(problem, kept, {}, some[skip:])[1]

    def changes(self, problem: Problem, kept: Mapping[str, int],
                moves: Mapping[str, Sequence[int]],
                batches: int) -> tuple[dict[tuple[str, int], Change], float]:
        """Return what each move (a unit to another count) does to the divergence of the pruned
        and repaired network from the dense one, and the divergence itself (see `sensitivity`).

        `batches` is how many count: half of them are the model's own text where it wrote some.
        """
        own = self.beside[: batches // 2]
        some = [*self.batches[: batches - len(own)], *own]
        return self._sensitivity(problem, quick=True).changes(problem, kept, moves, some)

    def _sensitivity(self, problem: Problem, *, quick: bool) -> Sensitivity:
        """What measures the network as the repair makes it, or as its quick stand-in does."""
        if quick not in self._sensible:
            how = draft(self.compensation) if quick else self.compensation
            self._sensible[quick] = Sensitivity(
                self.trace, self.solution, self._covariances(problem), how, self.plan, self._dense)
        return self._sensible[quick]

    def _covariances(self, problem: Problem) -> Scores:
        groups = [g for u in problem.units for g in u.groups]
        found, _ = sites(self.solution, self.plan(problem, problem.least()))
        if not all("covariance" in self.context.inputs(site.consumer) for site in found):
            self.context.calibrate({"covariance"}, self.batches, self.loss, groups=groups)
            self.context.widen({"covariance"}, self.beside, self.loss, groups)
        return self.context


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """batch_norm(x, gain, bias, ...) by the statistics of x."""
    eps = args[7] if len(args) > 7 else kwargs.get("eps", 1e-5)
    return functional.batch_norm(args[0], None, None, args[1], args[2], training=True, eps=eps)


def _native(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """_native_batch_norm_legit_no_training(x, gain, bias, mean, variance, momentum, eps)."""
    x, gain, bias, *_, eps = args
    made = functional.batch_norm(x, None, None, gain, bias, training=True, eps=eps)
    return made, x.new_zeros(0), x.new_zeros(0)


_BY_BATCH: Mapping[str, Override] = {
    "batch_norm": _batch_norm, "_native_batch_norm_legit_no_training": _native}


@torch.no_grad()
def angles(module: nn.Module, paths: Sequence[str], batches: Sequence[Batch],
           arrays: Arrays | None = None) -> dict[str, tuple[float, float]]:
    """Return {path: (mean angle / pi, mean cosine)} of blocks that map a hidden state to one.

    With other `arrays` in place of some of the module's own.
    """
    sums: dict[str, list[float]] = {}

    def see(path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
            out: object) -> None:
        before = args[0] if args else kwargs.get("hidden_states")
        after = first_floating(out if isinstance(out, (tuple, list)) else [out])
        if isinstance(before, torch.Tensor) and before.shape == after.shape:
            cosine = torch.cosine_similarity(before, after, -1).clamp(-1, 1).double()
            have = sums.setdefault(path, [0.0, 0.0, 0.0])
            have[0] += float(cosine.arccos().sum()) / pi
            have[1] += float(cosine.sum())
            have[2] += cosine.numel()

    with watched({path: module.get_submodule(path) for path in paths}, see):
        for args, kwargs in batches:
            torch.func.functional_call(module, dict(arrays or {}), args,
                                       inputs_only(module, kwargs))
    return {path: (a / n, c / n) for path, (a, c, n) in sums.items()}
