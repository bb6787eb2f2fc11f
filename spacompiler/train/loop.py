"""The loop behind every recovery pass: train what is left of a network, on little data.

A plain loop serves language models and convolutional networks alike: batches are calls, the
objective is any mix of the network's own loss and distillation from the dense network. What a run
ends with is the state that did best on held-out batches, the untrained one among them, so that
training never makes the held-out objective worse. A checkpoint resumes to the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..errors import SpaError
from ..evidence.calls import Batch
from ..evidence.reused import kept
from ..system.group import Team
from .ahead import Ahead
from .checkpoint import Checkpoint, Run
from .hooks import Hooks
from .masters import Masters
from .objective import Objective
from .options import Schedule
from .shared import alike, heard, summed


class Recovery(Protocol):
    """Train the pruned module."""

    name: ClassVar[str]

    def run(self, task: Training) -> dict[str, Any]:
        """Train `task.module` in place and return what happened, as plain data for the report."""


@dataclass
class Training:
    """What a recovery pass works on.

    `module` is the pruned network, trained in place; `dense` the one it was cut from (never
    changed). `batches` and `held_out` are calls (args, kwargs); a keyword `labels` goes to the
    loss alone. `loss` takes (flat results, args, kwargs). `key` names the run, so that a checkpoint
    of another one is refused; one that is damaged is, too, unless `damaged` takes word of it. The
    batches of a step are dealt out over `team`, whose first process alone keeps a checkpoint.
    """

    module: nn.Module
    dense: nn.Module | None
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    loss: Callable[..., torch.Tensor]
    seed: int = 0
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    checkpoint: Path | None = None
    key: str = ""
    damaged: Callable[[str], None] | None = None
    team: Team = field(default_factory=Team)

    @property
    def unit(self) -> str:
        """What batches are counted in: "tokens" where inputs are integers, else "examples"."""
        return "tokens" if _integers(self.batches[0]) else "examples"

    def amount(self, batches: Sequence[Batch]) -> int:
        """Return how many tokens (examples, where inputs are no tokens) batches hold."""
        return sum(x.numel() if _integers(b) else len(x) for b in batches
                   for x in [_first(b)])


def _first(batch: Batch) -> torch.Tensor:
    return next(x for x in (*batch[0], *batch[1].values()) if isinstance(x, torch.Tensor))


def _integers(batch: Batch) -> bool:
    return not _first(batch).is_floating_point()


def train(task: Training, options: Schedule, parameters: Mapping[str, nn.Parameter],
          hooks: Hooks | None = None) -> dict[str, Any]:
    """Train parameters of `task.module` in place and return what happened, as plain data.

    `hooks` may change the optimiser, what is done beside each step, and the loss.

    Raises:
        SpaError: nothing to train or to train on, a loss that is not finite, a checkpoint of
            another run, or tokens further ahead asked for where there are none.
    """
    _check(task, parameters)
    _own(task.module, parameters)
    ahead = Ahead(task.module, task.loss, [*task.batches, *task.held_out], options.ahead) \
        if options.ahead > 1 else None
    objective = Objective(task.module, task.dense, task.loss, options, ahead)
    hooks, masters = hooks or Hooks(), Masters({**parameters, **(ahead.heads if ahead else {})})
    optimizer = hooks.optimizer(masters.held, options)
    state = dict(masters.held) | {n: b for n, b in task.module.named_buffers()}
    run, best = Run(), _copied(state)
    book = Checkpoint(task.checkpoint if task.team.first else None, task.key, task.damaged)
    book.put(heard(task.team, book.found()), run, state, best, optimizer, masters.held)
    masters.give()
    was = task.module.training
    try:
        with kept():
            _loop(task, options, _Machine(objective, optimizer, hooks, masters), run, state, best,
                  lambda: book.save(run, state, best, optimizer, masters.held))
    finally:
        task.module.train(was)
    _restore(state, best)
    masters.give()
    return _facts(task, options, parameters, run) | (
        {"masters": "float32"} if masters.count else {}) | (
        {"ahead": options.ahead} if ahead else {})


def _check(task: Training, parameters: Mapping[str, nn.Parameter]) -> None:
    if not parameters:
        raise SpaError("the recovery pass has nothing to train",
                       why="no parameter of the pruned network is of the kind that it trains",
                       fix="use another pass, e.g. --recover full")
    if not task.batches or not task.held_out:
        raise SpaError("there is too little data to recover on", why=f"{len(task.batches)} "
                       f"batches to train on and {len(task.held_out)} held out",
                       fix="give more with --recover-data or --recover-samples")


def _own(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Training writes in place: what it writes must not be shared with the dense network."""
    trained = {id(p) for p in parameters.values()}
    for p in module.parameters():
        p.requires_grad_(id(p) in trained)
        p.grad = None
    for p in parameters.values():
        p.data = p.data.clone()
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.clone()


@dataclass(frozen=True)
class _Machine:
    """What takes a step."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    hooks: Hooks
    masters: Masters


def _loop(task: Training, options: Schedule, machine: _Machine, run: Run,
          state: Mapping[str, torch.Tensor], best: dict[str, torch.Tensor],
          save: Callable[[], None]) -> None:
    steps = _steps(task, options)
    every = max(1, steps // _evaluations(task, options))
    started = time.monotonic() - run.seconds
    if not run.history:
        _evaluate(task, options, machine.objective, run, state, best)
    while run.step < steps and run.worse < options.patience:
        loss = _step(task, options, machine, run.step, steps)
        run.step += 1
        if run.step % every == 0 or run.step == steps:
            _evaluate(task, options, machine.objective, run, state, best)
            run.seconds = time.monotonic() - started
            save()
        _tell(task, run, steps, loss, time.monotonic() - started)


LOOKS, MOST = 1 / 16, 8
"""Batches of held-out data that are looked at, for each that is trained on, in all evaluations;
and how many of these there are at most, if nobody says a number."""


def _evaluations(task: Training, options: Schedule) -> int:
    """How often held-out data is looked at after steps: at the end, at least."""
    budget = int(LOOKS * options.epochs * len(task.batches))
    return options.evaluations or min(MOST, max(1, budget - 1))  # one is before the first step


def _looked_at(task: Training, options: Schedule) -> Sequence[Batch]:
    """The held-out batches that evaluations look at, the same each time: at least one.

    A forward pass costs half of a step: more would cost more than it says.
    """
    share = LOOKS * options.epochs * len(task.batches) / (_evaluations(task, options) + 1)
    return task.held_out[:max(1, round(share))]


def _steps(task: Training, options: Schedule) -> int:
    return options.epochs * -(-len(task.batches) // options.accumulate)


def _step(task: Training, options: Schedule, machine: _Machine, step: int, steps: int) -> float:
    """Take one step of the optimiser over `accumulate` batches; returns their mean objective."""
    optimizer, hooks, rate = machine.optimizer, machine.hooks, options.rate(step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)
    task.module.train()
    _seed(task, step, 0)
    hooks.begin(step, optimizer)
    total = _graded(task, machine, step, _chosen(task, options, step))
    if not math.isfinite(total):
        raise SpaError("training diverged", where=f"step {step + 1}",
                       why="the loss is not finite", fix=f"use a smaller lr than {options.lr}")
    machine.masters.take()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, options.clip)
    hooks.graded(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    machine.masters.give()
    hooks.done(step, rate)
    return total


def _graded(task: Training, machine: _Machine, step: int, batches: Sequence[Batch]) -> float:
    """Add up gradients of the mean objective of batches, and of the hooks' loss; returns it."""
    def run(number: int) -> float:
        _seed(task, step, number + 1)
        value = machine.objective(batches[number]).total / len(batches)
        value.backward()
        return value.item()

    total = summed(task.team, len(batches), run, machine.masters.parameters)
    _seed(task, step, len(batches) + 1)
    more = machine.hooks.loss()
    if more is not None:
        more.backward()  # type: ignore[no-untyped-call]
        total += more.item()
    return total


def _seed(task: Training, step: int, number: int) -> None:
    """What a batch draws (dropout) follows from its number, whichever process runs it."""
    torch.manual_seed(((task.seed * 1_000_003 + step) * 10_007 + number) % 2 ** 63)


def _chosen(task: Training, options: Schedule, step: int) -> list[Batch]:
    """The batches of a step: each epoch has an order of its own, that follows from the seed."""
    n = len(task.batches)
    epoch, at = divmod(step, -(-n // options.accumulate))
    generator = torch.Generator().manual_seed(task.seed * 1_000_003 + epoch)
    order = torch.randperm(n, generator=generator).tolist()
    return [task.batches[i]
            for i in order[at * options.accumulate:(at + 1) * options.accumulate]]


def _evaluate(task: Training, options: Schedule, objective: Objective, run: Run,
              state: Mapping[str, torch.Tensor], best: dict[str, torch.Tensor]) -> None:
    """Look at the held-out batches; a better state than any before is kept."""
    task.module.eval()
    alike(task.team, state)
    batches = _looked_at(task, options)

    def look(batch: Batch) -> tuple[float, ...]:
        return tuple(x.item() for x in objective(batch) if x is not None)

    with torch.no_grad():
        found = list(task.team.each(batches, look, "held-out batches"))
    means = {name: sum(x / len(batches) for x in values) for name, values in zip(
        ("objective", "loss", "further"), zip(*found, strict=True), strict=False)}
    run.history.append({"step": run.step, **means})
    if means["objective"] < run.best:
        run.best, run.best_step, run.worse = means["objective"], run.step, 0
        best.update(_copied(state))
    else:
        run.worse += 1


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _restore(state: Mapping[str, torch.Tensor], best: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(best[name])


def _tell(task: Training, run: Run, steps: int, loss: float, seconds: float) -> None:
    done = task.amount(task.batches) * run.step / steps
    speed = done / max(seconds, 1e-9)
    left = seconds / run.step * (steps - run.step)
    task.progress(f"training: loss {loss:.3f}, held out {run.history[-1]['objective']:.3f}, "
                  f"{speed:,.0f} {task.unit}/s, {int(left // 60)}:{int(left % 60):02d} left",
                  run.step, steps)


def _facts(task: Training, options: Schedule, parameters: Mapping[str, nn.Parameter],
           run: Run) -> dict[str, Any]:
    steps = _steps(task, options)
    return {"steps": run.step, "planned_steps": steps, "best_step": run.best_step,
            "unit": task.unit, "amount": round(task.amount(task.batches) * options.epochs
                                               * run.step / steps),
            "held_out": task.amount(_looked_at(task, options)),
            "parameters": sum(p.numel() for p in parameters.values()),
            "before": run.history[0], "after": next(
                h for h in run.history if h["step"] == run.best_step),
            "history": run.history}


def vectors(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the gains of norms and all biases: every parameter of one dimension."""
    for name, p in module.named_parameters():
        if p.ndim <= 1 and p.is_floating_point():
            yield name, p
