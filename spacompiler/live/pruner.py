"""Prune a model in the user's own training loop: before, during and after training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spacompiler.errors import SpaError, TargetError, UsageError
from spacompiler.evidence.calls import Inputs
from spacompiler.groups.cost import cost
from spacompiler.live import ramp, stock
from spacompiler.live.agreed import Wrapper, agreed
from spacompiler.live.candidates import average, candidates, measured, read_by_modules
from spacompiler.live.kept import Kept, lowest_out
from spacompiler.live.options import recipe, split
from spacompiler.live.shrinking import Shrinking
from spacompiler.live.sites import Site
from spacompiler.live.softening import soften
from spacompiler.live.watch import GATES, Watch
from spacompiler.plan import legal as allocation
from spacompiler.plan.plan import costs
from spacompiler.plan.problem import Problem, Unit, check_met
from spacompiler.request import registry
from spacompiler.request.targets import is_nearest, parse_target
from spacompiler.store import strict_json
from spacompiler.system.process import alone
from spacompiler.torch_backend.machine import lanes
from spacompiler.torch_backend.read.readable import check_readable

STATE_VERSION = 1


class Pruner:
    """Watches a training run and shrinks its model in place, with the optimiser's state.

    Scores are measured just before each optimiser step (a hook of the optimiser calls it) and
    averaged: S <- ema * S + (1 - ema) * score. `step()`, called once after each optimiser step,
    removes the lowest slices whenever the schedule says so. The module, its Parameter objects,
    their requires_grad, ties and modes, and the optimiser's parameter groups stay what they are;
    arrays, gradients, optimiser state and size attributes become smaller. Every removal is
    compared with the masked model (float64) before training goes on, and undone if it is wrong.
    `notes` say what stays though it was asked for, and why.

    Args:
        model: the module that is trained, in any mode.
        example_inputs: as for `compile`; batch 2 or more.
        optimizer: one, several, or None (give it later by `attach`, or prune without training).
        target: what stays at the end: `params=50%`, `body=...` or `macs=...`.
        schedule: `cubic(steps=...)`, `linear(steps=...)`, `once(at=...)`, or an object.
        importance, allocation: passes as for `compile`; a pass may need gates, token_gates
            (gradients at activations) and weight_gradients (`.grad`).
        ema: the moving average's memory, 0 to below 1 (0.9).
        prove: compare each shrunk model with the masked one (True).
        soft: what slices that would go at the end, by the scores so far, are multiplied by after
            each step (1: nothing); what was shrunk wrongly may grow again (ISS-P, 2023).
        options: further fields of `Recipe`: roles, only, ignore, approximate, align (1), floor,
            seed, layout (`uniform`: all layers alike, as a transformers config can say; `any`;
            `auto`: uniform where that meets the target).

    Raises:
        UsageError: the request is malformed. TargetError: nothing may go.
        SpaError: the module cannot be traced.
    """

    @alone()
    def __init__(self, model: nn.Module, example_inputs: Inputs,
                 optimizer: object = None, *, target: str, schedule: object = "cubic",
                 importance: object = "taylor", allocation: object = "uniform",
                 **options: object) -> None:
        manner, asked = split(options)
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self._wrapper = Wrapper(self.model)
        self.recipe = recipe(target, asked, set(signature(type(self)).parameters) - {"options"})
        check_readable(self.model)
        self.schedule = ramp.find(schedule)
        self.importance = registry.find("importance", importance)
        self.allocation = registry.find("allocation", allocation)
        self.ema, self.soft, self.steps, self.done = manner.ema, manner.soft, 0, False
        self._optimizers: list[torch.optim.Optimizer] = []
        self._hooks: list[Any] = []
        self._scores: dict[str, np.ndarray] = {}
        self._measured = False
        self.live = Shrinking(self.model, example_inputs, check=manner.prove, seed=self.recipe.seed)
        self._dense = self.live.dense
        self.notes: list[str] = []
        self.groups = candidates(self.model, self._dense, self.recipe, self.notes)
        self._price = cost(self._dense, parse_target(target)[0])
        self._dense_cost = self._price.total
        self._watch: Watch | None = None
        self._sites: list[Site] = []
        if set(GATES) & set(self.importance.needs):
            self._sites, self.groups = read_by_modules(
                self.model, self.live.trace, self.live.solution, self.groups,
                self.importance.name, self.notes)
        self._look()
        self._stock: list[Unit] = []
        self._check_target()
        self.attach(optimizer)

    # --- the loop -----------------------------------------------------------------------------

    def attach(self, optimizer: object) -> None:
        """Follow one or several optimisers: their state shrinks too, their steps are watched."""
        if optimizer is None:
            return
        many = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        for given in many:
            each: Any = getattr(given, "optimizer", given)  # accelerate wraps it
            if any(each is have for have in self._optimizers):
                continue
            if not self._optimizers:
                self._hooks.append(each.register_step_pre_hook(self._before))
            self._optimizers.append(each)

    def _before(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Watch before a step; where a closure makes the gradients, within it (Lightning)."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return self.watch()

        def watched() -> Any:
            value = closure()
            self.watch()
            return value

        return (optimizer,), {**kwargs, "closure": watched}

    def watch(self) -> None:
        """Measure importance from the gradients at hand (the optimiser's step calls it)."""
        if self._watch is None or not self.importance.needs:
            return
        found = self._measure()
        self._watch.clear()
        self._measured |= average(self._scores, found, self.ema)

    def step(self) -> bool:
        """Count one optimiser step and remove what is due; True if the model shrank.

        Raises ProofError, with the model as it was before, if the shrunk model would be wrong.
        """
        if not self.schedule.steps:
            raise UsageError("the schedule does not know how many steps the run has",
                             fix="say so: schedule='cubic(steps=1000)'")
        self.steps += 1
        if not self.done and self.soft < 1 and (self._measured or not self.importance.needs):
            later = self.live.kept.relative(self.planned(1.0), self.live.solution)
            soften(self.model, self.live.solution, later, self.soft)
        if self.done or not self.schedule.due(self.steps):
            return False
        return self.shrink(self.schedule.share(self.steps))

    @alone()
    def finish(self) -> None:
        """Remove what is still due, check that the target is met, and take out all hooks.

        A transformers model's config is brought in step where it can say the widths, so that
        `save_pretrained` writes what stock transformers loads; elsewhere it refuses (see `notes`).

        Raises TargetError if the target is missed.
        """
        if not self.done:
            self.shrink(1.0)
        self.stop()
        problem = self._problem(self._units())
        check_met(problem, {u.name: self.live.kept.count(u.groups[0].name)
                                       for u in problem.units})
        if self._stock:
            refused = stock.bring_config(self.live)
            self.notes += [f"the config stays as it was: {refused}"] if refused else []
        if not stock.end_shrinking(self.model):
            self.notes.append("no configuration says these widths: save_pretrained refuses")

    def stop(self) -> None:
        """Take out all hooks; the model stays as it is."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None
        self._wrapper.stop()
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    # --- one removal --------------------------------------------------------------------------

    @alone()
    def shrink(self, share: float = 1.0) -> bool:
        """Bring the model to a share (0 to 1) of the final removal now; True if it shrank."""
        later = self.planned(share)
        shrank = self._to(later)
        self.done = share >= 1
        if self.done and self._watch is not None:
            self._watch.stop()
            self._watch = None
        return shrank

    def planned(self, share: float) -> Kept:
        """Return what would be kept at a share of the final removal, by the scores so far."""
        scores = self._current_scores()
        problem = self._problem(self._units(scores))
        final = self.allocation.allocate(problem)
        check_met(problem, final)
        tables = dict(self.live.kept.tables)
        for unit in problem.units:
            now = self.live.kept.count(unit.groups[0].name)
            due = ramp.staying(unit.size, final[unit.name], share)
            count = min(now, next(k for k in unit.legal if k >= due))
            for group in unit.groups:
                if count < now:
                    tables[group.name] = lowest_out(self.live.kept, group,
                                                    scores[group.name], count)
        return Kept(self._dense, tables)

    def _to(self, later: Kept) -> bool:
        self._wrapper.check(shrinks=later.as_plain() != self.live.kept.as_plain())
        shrank = self.live.to(later, self._optimizers)
        if shrank:
            self._look()
            stock.begin_shrinking(self.model)
        return shrank

    # --- scores and counts --------------------------------------------------------------------

    def _check_target(self) -> None:
        """Choose the layout; raises TargetError now rather than in the middle of a run."""
        layout = self.recipe.layout
        if layout == "per-layer":
            raise UsageError("a Pruner makes no layout per-layer", fix="use layout='any', and "
                             "compile the trained model, or layout='uniform'")
        if layout in ("auto", "uniform"):
            self._stock, notes = stock.expressible(self.live, self._plain_units(uniform=True))
            self.notes += notes
            if self._stock and self._meets():
                return
            if layout == "uniform":
                raise TargetError("the target cannot be met in the uniform layout",
                                  why="; ".join(notes[:2]) or "no stock config can say it",
                                  fix="use layout='any'")
            self._stock = []
        self._meets(check=True)

    def _meets(self, *, check: bool = False) -> bool:
        problem = self._problem(self._units())
        kept = self.allocation.allocate(problem)
        if check:
            try:
                check_met(problem, kept)
            except TargetError as error:
                error.why = "; ".join([error.why, *self.notes[:2]])
                raise
        return problem.met(kept)

    def _measure(self) -> dict[str, np.ndarray]:
        """Score every candidate as it is now, in the dense shape."""
        assert self._watch is not None
        now = (self.live.solution.groups[g.name] for g in self.groups)
        return measured(self.importance, self._watch, now, self.live.kept)

    def _look(self) -> None:
        """Watch the model as it is now."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = Watch(self.model, self.live.trace, self.live.solution, self._sites,
                            self.importance.needs, self.recipe.seed)

    def _current_scores(self) -> dict[str, np.ndarray]:
        """The moving averages; measured now where a pass needs no gradients."""
        if not self.importance.needs:
            self._scores = self._measure()
        elif not self._measured:
            raise SpaError(
                "nothing has been measured yet", why=f"{self.importance.name} needs gradients",
                fix="attach the optimiser and let it step (or call watch() after backward), "
                    "or use importance='magnitude'")
        self._scores = agreed(self._scores)
        return {name: np.where(self.live.kept.table(name), score, 0.0)
                for name, score in self._scores.items()}

    def _units(self, scores: Mapping[str, np.ndarray] | None = None) -> tuple[Unit, ...]:
        plain = self._plain_units(scores)
        single = {u.groups[0].name: u for u in plain}
        return tuple(stock.with_losses(u, single) for u in self._stock) or plain

    def _plain_units(self, scores: Mapping[str, np.ndarray] | None = None, *, uniform: bool = False
                     ) -> tuple[Unit, ...]:
        r = self.recipe
        scores = scores or {g.name: np.ones(g.shape) for g in self.groups}
        return allocation.units(self._dense, self.groups, scores, uniform=uniform, align=r.align,
                                lanes=lanes(), floor=r.floor)

    def _problem(self, units: Sequence[Unit]) -> Problem:
        metric, share = parse_target(self.recipe.target)
        self._price.set({g.atom: g.size for g in self.groups})
        return Problem(tuple(units), self._price, share * self._dense_cost, self._dense_cost,
                       metric, closest=is_nearest(self.recipe.target))

    # --- what is said and saved ---------------------------------------------------------------

    @property
    def kept(self) -> dict[str, int]:
        """How many slices each candidate group has now (inside each outer slice)."""
        return {g.name: self.live.kept.count(g.name) for g in self.groups}

    def costs(self) -> dict[str, dict[str, int]]:
        """Return {metric: {dense, pruned}} of the model as it is now."""
        return costs(self._dense, self.live.kept.choices())

    def state_dict(self) -> dict[str, Any]:
        """Return widths, scores and progress as plain data (numbers, strings, lists)."""
        return {"version": STATE_VERSION, "target": self.recipe.target, "steps": self.steps,
                "done": self.done, "kept": self.live.kept.as_plain(),
                "attributes": [[*key, value] for key, value in self.live.attributes.items()],
                "scores": {name: score.tolist() for name, score in self._scores.items()}}

    @alone()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring a dense model to a saved run's widths; load weights and optimiser afterwards.

        Raises SpaError if the state is of another model or version, UsageError if this model has
        shrunk already.
        """
        if state.get("version") != STATE_VERSION:
            raise SpaError(f"the pruner's state has version {state.get('version')}",
                           why=f"this one reads version {STATE_VERSION}")
        if not all(self.live.kept.table(g.name).all() for g in self.groups):
            raise UsageError("the model has shrunk already", fix="build the dense model anew")
        self._to(self.live.kept.read(state["kept"]))
        self.live.set_attributes(state["attributes"])
        self.steps = state["steps"]
        self._scores = {name: np.asarray(score, dtype=float)
                        for name, score in state["scores"].items()}
        self._measured = bool(self._scores)
        if state["done"]:
            self.done = True
            self.stop()

    def save(self, path: str | Path) -> None:
        """Write `state_dict()` as JSON."""
        Path(path).write_text(json.dumps(self.state_dict()) + "\n", encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote (see `load_state_dict`)."""
        self.load_state_dict(strict_json.read(Path(path), {str: object},
                                              fix="give a file that Pruner.save wrote"))
