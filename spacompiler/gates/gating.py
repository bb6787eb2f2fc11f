"""What every pass that learns gates is: options with defaults, and one run.

A pass is a row: it says which relaxation, which budget, what trains beside, and which objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..axes.choices import Choices
from ..errors import TargetError, UsageError
from ..evidence.calls import Batch
from ..evidence.scores import Scores
from ..groups.solution import Group
from ..plan.problem import Problem
from ..request import registry
from ..stages.records import Scheduling, Scored
from ..torch_backend.gather.context import fresh_context
from ..torch_backend.run.observe import ProgramNetwork
from .beside import Beside, Operators, beside
from .budgets import budget
from .folding import check, fold, products, scalable
from .learning import Learner, Pace
from .network import Gated, Values, ones
from .objective import Aim
from .pieces import endless, pieces
from .projection import Order, Projection, choices, tables
from .refits import Refitted
from .relaxations import relaxation, standardised
from .scaling import learn_scales

Dense = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Gating:
    """Learn gates on slices under a budget, and fold what they learned into the weights.

    `criterion` says where gates start; `relaxation`, `budget` and `beside` are rows of the tables
    of those names; `task`, `logits` and `blocks` weigh the own loss, the divergence from the dense
    network, and the errors of products that read gated slices. A step is one batch of the
    calibration, or a piece of one: `rows` examples, `length` tokens. With `refit`, gradients know
    that the others are fit anew, on a ridge of so much of the mean diagonal. Then, after the repair
    if there is one, `scales` steps fit a factor of each slice that stays; with `streams` also one
    of each row that writes into the hidden dimension.
    """

    criterion: str = "taylor"
    relaxation: str = "straight-through"
    budget: str = "projection"
    beside: str = "nothing"
    steps: int = 80
    lr: float = 0.05
    beside_lr: float = 1e-3
    every: int = 1
    average: bool = False
    rows: int = 0
    length: int = 0
    task: float = 0.0
    logits: float = 1.0
    blocks: float = 0.0
    refit: float = 0.0
    scales: int = 0
    scale_lr: float = 0.01
    streams: bool = False
    lean: bool = True
    name: ClassVar[str] = ""
    by_layer: ClassVar[bool] = True
    learner: ClassVar[type[Learner]] = Learner

    def __post_init__(self) -> None:
        if min(self.steps, self.every) < 1 or min(self.rows, self.length, self.scales) < 0:
            raise TypeError("steps and every must be at least 1, rows, length, scales at least 0")
        if not self.task and not self.logits and not self.blocks:
            raise TypeError("there is nothing to learn by: set task, logits or blocks")
        rule, rows = budget(self.budget), relaxation(self.relaxation)
        beside(self.beside)
        if rows.projected and not rule.projects:
            raise UsageError(f"{self.relaxation!r} learns under masks that meet the budget",
                             fix="use budget='projection'")
        if rows.by_input and rule.projects:
            raise UsageError(f"{self.relaxation!r} has no mask that holds for all inputs",
                             fix="use budget='penalty' or 'lagrangian'")
        if self.refit and not rule.projects:
            raise UsageError("refit needs masks that meet the budget",
                             fix="use budget='projection', or refit=0")

    def run(self, task: Scheduling) -> Scored:
        """Learn which slices stay; return them as scores, with counts that meet the target.

        What trained beside, and the factors of gates that are not one, are in the program then.

        Raises TargetError if no gate can stand anywhere, or the target cannot be met.
        """
        gated = self._gated(task)
        importance, context, scores = self._scored(task, gated)
        problems = task.problems(
            gated.groups, {n: s.double().numpy() for n, s in scores.items()})
        made = self._learner(task, gated, problems[0][0], context, scores)
        made.run(endless(self._pieces(task), task.seed), task.tell)
        order = made.order()
        few = max(1, self.steps // 10)
        task.notes.append(
            f"{self.name}: {self.steps} steps on {task.calibration.origin}, objective "
            f"{np.mean(made.losses[:few]):.3f} at first, {np.mean(made.losses[-few:]):.3f} at the "
            "end")
        counts, stock = self._settled(task, gated, made, problems)
        return Scored(importance, tuple(gated.groups), dict(order), counts, stock, context)

    def after(self, task: Scheduling, chosen: Choices) -> None:
        """Fit a factor of each slice that stays in the network as it was repaired, and fold it."""
        if not self.scales:
            return
        gated = Gated(task.trace, task.solution, [g for g in task.candidates if g.reads])
        hidden = [g for g in task.solution.groups.values() if g.role == "hidden"]
        trains = Operators(rank=0) if self.streams and hidden else Beside()
        trains.start(Gated(task.trace, task.solution, hidden), ProgramNetwork(task.trace).stored,
                     torch.Generator())
        learn_scales(gated, chosen, self._aim(task, gated, _dense(task)),
                     endless(self._pieces(task), task.seed + 1), task,
                     steps=self.scales, lr=self.scale_lr, trains=trains)

    def _settled(self, task: Scheduling, gated: Gated, made: Learner,
                 problems: Sequence[tuple[Problem, str]]) -> tuple[dict[str, int], str]:
        """Find counts that meet the target, and put what was learned into the program."""
        order = made.order()
        counts, stock, notes = _met(problems, order)
        task.notes.extend(notes)
        self._fold(task, gated, made, tables(list(gated.groups), order, counts))
        return counts, stock

    # --- parts --------------------------------------------------------------------------------

    def _gated(self, task: Scheduling) -> Gated:
        """The candidates that gates can stand on; a note names the others."""
        every = Gated(task.trace, task.solution, task.candidates)
        without = set(every.ungated())
        task.notes.extend(f"{name} stays: it is read nowhere that a gate can stand"
                          for name in sorted(without))
        groups = [g for g in task.candidates if g.name not in without]
        if not groups:
            raise TargetError("nothing to prune", where=self.name,
                              why="; ".join(task.notes[-2:]) or "no group may go",
                              fix="score in one shot (no --schedule)")
        return Gated(task.trace, task.solution, groups)

    def _scored(self, task: Scheduling,
                gated: Gated) -> tuple[Any, Scores, dict[str, torch.Tensor]]:
        """The criterion, what it saw, and what it says of each group."""
        context = task.context or fresh_context(task.trace, task.solution, task.seed)
        importance = registry.find("importance", self.criterion)
        return importance, context, _scores(task, gated.groups, importance, context)

    def _learner(self, task: Scheduling, gated: Gated, problem: Problem, context: Scores,
                 scores: Values) -> Learner:
        network, soft = ProgramNetwork(task.trace), relaxation(self.relaxation)
        soft.start(gated.groups, standardised(scores, _prices(problem)), problem)
        trains = beside(self.beside)
        trains.start(gated, network.stored, torch.Generator().manual_seed(task.seed))
        return self.learner(
            gated, soft, budget(self.budget), trains,
            self._aim(task, gated, network.stored), Projection(problem),
            Pace(self.steps, self.lr, self.beside_lr, self.every, average=self.average,
                 lean=self.lean and not self.blocks),
            self._refitted(task, gated, context), task.seed)

    def _aim(self, task: Scheduling, gated: Gated, dense: Dense) -> Aim:
        nodes = [node for node, _ in products(task.solution, list(gated.places))]
        return Aim(task.trace, task.loss, dense, self.task, self.logits, self.blocks, nodes)

    def _refitted(self, task: Scheduling, gated: Gated, context: Scores) -> Refitted | None:
        if not self.refit:
            return None
        found = list(products(task.solution, list(gated.places)).values())
        if not all("covariance" in context.inputs(at) for at in found):
            context.calibrate({"covariance"}, task.calibration.for_repair, task.loss,
                              groups=[g for g in gated.groups if context.measurable(g)])
        made = Refitted(gated, {at.key: context.inputs(at)["covariance"] for at in found
                                if "covariance" in context.inputs(at)}, self.refit)
        return None if made.empty else made

    def _pieces(self, task: Scheduling) -> Sequence[Any]:
        """Batches cut to the size of a step, where the program serves other sizes."""
        graph = task.trace.graph
        given = [t for t in map(graph.tensors.__getitem__, graph.inputs) if t.shape]
        free = [all(d in t.dynamic for t in given if len(t.shape) > d) for d in (0, 1)]
        return pieces(task.calibration.for_repair, self.rows * free[0], self.length * free[1])

    def _fold(self, task: Scheduling, gated: Gated, made: Learner,
              kept: dict[str, np.ndarray]) -> None:
        """Put what was learned into the program, and check that it computes what gates did.

        What trained did so without the slices that go: where that can be said by zeros they are
        put there, so that a repair takes the network as it trained for the one to come near to.
        """
        able, final, trained = scalable(gated), made.final(), made.beside.trained()
        values = ones(gated.groups) | {
            n: torch.where(torch.from_numpy(kept[n]), final[n].double(), 0.0)
            for n in able if trained or not bool((final[n] == 1).all())}
        if all(bool((z == 1).all()) for z in values.values()) and not trained:
            return
        network, mask = ProgramNetwork(task.trace), choices(list(gated.groups), kept)
        call = task.trace.labelled(task.trace.args, task.trace.kwargs)
        with torch.no_grad():
            before = _run(gated, call, values, mask, made.beside)
            for name, first in task.trace.tied.items():
                if first in trained:
                    network.put(name, trained[first])
            fold(gated, network, values)
            after = _run(gated, call, ones(gated.groups), mask, None)
        kinds = {x.dtype for x in task.trace.program.state_dict.values()}
        check(gated, before, after, kinds, self.name)


def _run(gated: Gated, call: Batch, values: Values, mask: Choices,
         trains: Beside | None) -> list[torch.Tensor]:
    """Results in float64 under a mask, as the proof has it, and gates beside."""
    masked = {g.name: values[g.name].double() * (
        torch.from_numpy(mask[g.atom].table).double() if g.atom in mask else 1.0)
        for g in gated.groups}
    results = gated.call(call, masked, choices=mask, double=True,
                         weights=trains.weight if trains is not None else None)
    return [x for x in pytree.tree_leaves(results) if isinstance(x, torch.Tensor)]


def _scores(task: Scheduling, groups: Sequence[Group], importance: Any,
            context: Scores) -> dict[str, torch.Tensor]:
    """What the criterion says of each group; statistics at hand are not gathered again."""
    if all(g.name in task.scores for g in groups):
        return {g.name: torch.as_tensor(task.scores[g.name]) for g in groups}
    if importance.needs:
        context.calibrate(importance.needs, task.calibration.batches, task.loss, groups=groups)
        wider = {"covariance", "curvature"} & set(importance.needs)
        if not getattr(importance, "continued", True):
            wider -= {"curvature"}
        if task.calibration.beside and wider:
            context.widen(wider, task.calibration.beside, task.loss, groups)
    return {g.name: torch.as_tensor(importance.score(g, context)).detach() for g in groups}


def _met(problems: Sequence[tuple[Problem, str]],
         order: Order) -> tuple[dict[str, int], str, list[str]]:
    """Counts by group of the first layout that meets the target, which it is, and what is to be
    said of it. Raises TargetError if none does.
    """
    for i, (problem, stock) in enumerate(problems):
        projection = Projection(problem)
        problem.price(problem.full())
        try:
            kept = projection.counts(order, exact=True)
        except TargetError:
            if i == len(problems) - 1:
                raise
            continue
        return projection.by_group(kept), stock, problem.notes
    raise AssertionError("there is no layout")


def _prices(problem: Problem) -> dict[str, float]:
    """What one slice of each group costs in the dense network."""
    problem.price(problem.full())
    return {g.name: max(-float(problem.cost.change({g.atom: g.size - 1})), 1.0)
            for u in problem.units for g in u.groups if g.size > 1}


def _dense(task: Scheduling) -> Dense:
    """The dense network's arrays, whatever a repair has put into the program."""
    program = task.trace.program
    held = {**program.state_dict, **program.constants}
    if isinstance(task.module, nn.Module) and task.trace.repaired:
        held |= {n: a.detach() for n, a in task.module.state_dict().items() if n in held}
        held |= task.trace.computed
    return held.__getitem__

