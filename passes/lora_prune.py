"""LoRAPrune: train adapters while masks grow, guided by the adapters' own gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils import _pytree as pytree

from spacompiler.errors import SpaError, TargetError
from spacompiler.evidence.calls import Batch
from spacompiler.evidence.protocol import Importance
from spacompiler.groups.repeats import family
from spacompiler.groups.solution import Group
from spacompiler.live.attached import Attached, adaptable
from spacompiler.live.candidates import average
from spacompiler.live.kept import Kept, lowest_out
from spacompiler.live.ramp import Cubic, staying
from spacompiler.live.sites import MASKED, Masks, Site, sites
from spacompiler.live.watch import Watch
from spacompiler.request import registry
from spacompiler.stages.records import Scheduling, Scored

LETS_GO: dict[str, Any] = {"protect_first": 0, "protect_last": 0, "targets": ""}
"""Options that keep groups, and what they are where they keep none."""
ONE_SHOT = "score in one shot (no --schedule)"


@dataclass(frozen=True)
class LoraPrune:
    """Adapters learn while a growing share of slices is masked; both are folded in at the end.

    Zhang et al., LoRAPrune (arXiv 2305.18403), by the released code: after each backward (and
    clipping) S <- ema * S + (1 - ema) * score; every `every` steps the lowest of each group are
    masked where they are read, `share(step)` of what is to go; groups of the first
    `protect_first` of the layers and of the last `protect_last` stay whole. How much each other
    group loses comes from the target, by the allocation. Weights of the base are frozen
    (`dtype="bfloat16"` holds those of adapted layers in half the memory) and come out merged.

    Defaults are those of the released `prune.py`, but for `targets`, a regular expression over
    layers (default: all that the groups pass through), and `accumulate` (it has 32 micro-batches
    a step, here the user's batches are used as they come). `criterion` may be any pass that needs
    adapter_steps, gates, token_gates, elements or vectors (`taylor`, `taylor-vector` and
    `taylor-element(per='batch')` are exact and as lean); `adapter` any type of peft's that
    merges. Batches are those of the calibration.
    """

    name: ClassVar[str] = "lora-prune"
    criterion: Any = "lora-gradient"
    epochs: int = 3
    steps: int = 0
    accumulate: int = 1
    lr: float = 3e-4
    warmup_steps: int = 100
    clip: float = 1.0
    weight_decay: float = 0.0
    adapter: str = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: str = ""
    dtype: str = "float32"
    start: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int = 10
    ema: float = 0.9
    protect_first: float = 0.1
    protect_last: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise TypeError("dtype must be float32, bfloat16 or float16")
        if min(self.epochs, self.accumulate, self.every) < 1 or self.steps < 0:
            raise TypeError("epochs, accumulate and every must be at least 1, steps at least 0")

    def run(self, task: Scheduling) -> Scored:
        """Train the task's module in place; return what may go, with counts and scores.

        Raises SpaError if training diverges; TargetError if nothing may go.
        """
        criterion = registry.find("importance", self.criterion)
        asked = task.candidates
        reachable = adaptable(task.module, asked, self.targets)
        task = replace(task, candidates=tuple(self._free(task, criterion)))
        places = sites(task.module, task.trace, task.solution, task.candidates)
        task = replace(task, candidates=tuple(_seen(task, places, asked)))
        if not reachable:
            raise self._nothing(task, asked, criterion)
        counts, stock = task.allocate(
            task.candidates, {g.name: np.ones(g.shape) for g in task.candidates})
        attached = Attached(task.module, reachable, adapter=self.adapter, dtype=self.dtype,
                            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout)
        masks = Masks(task.module, task.solution, places)
        watch = Watch(task.module, task.trace, task.solution, places, criterion.needs,
                      task.seed, stream=task.candidates)
        training = task.module.training
        try:
            task.module.train()
            kept, scores = self._train(task, counts, attached, masks, watch, criterion)
        finally:
            task.module.train(training)
            watch.stop()
            masks.remove()
        attached.off(merge=True)
        return Scored(criterion, task.candidates, {
            name: np.where(kept.table(name), score, -1.0) for name, score in scores.items()},
            counts, stock)

    # --- the loop -----------------------------------------------------------------------------

    def _train(self, task: Scheduling, counts: dict[str, int], attached: Attached, masks: Masks,
               watch: Watch, criterion: Importance) -> tuple[Kept, dict[str, np.ndarray]]:
        adapters = attached.parameters()
        total = self.steps or self.epochs * ceil(len(task.calibration.batches) / self.accumulate)
        ramp = Cubic(total, self.every, self.warmup, self.cooldown, self.start)
        optimizer = torch.optim.AdamW(adapters, lr=self.lr,
                                      weight_decay=self.weight_decay)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(
            step, total, min(self.warmup_steps, total // 10)))
        calls = _endless(task.calibration.batches, task.seed)
        kept = Kept(task.solution, {})
        averages = {g.name: np.zeros(g.shape) for g in task.candidates}
        losses = []
        for step in range(1, total + 1):
            losses.append(self._backward(task, calls))
            torch.nn.utils.clip_grad_norm_(adapters, self.clip)
            self._measure(task.candidates, watch, criterion, averages)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            if ramp.due(step):
                kept = self._masked(task, counts, kept, averages, ramp.share(step))
                masks.set(kept.choices())
            task.tell(f"training, loss {losses[-1]:.3f}", step, total)
        few = max(1, total // 20)
        task.notes.append(f"{self.name}: {total} steps on {task.calibration.origin}, loss "
                         f"{np.mean(losses[:few]):.3f} at first, {np.mean(losses[-few:]):.3f} at "
                         "the end, pruned")
        return kept, averages

    def _backward(self, task: Scheduling, calls: Iterator[Any]) -> float:
        total = 0.0
        for _ in range(self.accumulate):
            given, labelled = task.trace.labelled(*next(calls))
            args, kwargs = task.trace.match(given, labelled)
            loss = task.loss(pytree.tree_leaves(task.module(*args, **kwargs)), args, labelled)
            (loss / self.accumulate).backward()
            total += loss.item() / self.accumulate
        if not np.isfinite(total):
            raise SpaError("training diverged: the loss is not finite", where=self.name,
                           fix="lower the learning rate: lora-prune(lr=...)")
        return total

    def _measure(self, groups: Sequence[Group], watch: Watch, criterion: Importance,
                 averages: dict[str, np.ndarray]) -> None:
        """Update the moving averages, unless a score is not finite."""
        found = {g.name: criterion.score(g, watch).detach().double().numpy() for g in groups}
        watch.clear()
        average(averages, found, self.ema)

    def _masked(self, task: Scheduling, counts: dict[str, int], kept: Kept,
                averages: dict[str, np.ndarray], share: float) -> Kept:
        """Return what stays when `share` of the removal is due; masks only grow."""
        tables = dict(kept.tables)
        for group in task.candidates:
            due = staying(group.size, counts[group.name], share)
            if due < kept.count(group.name):
                tables[group.name] = lowest_out(kept, group, averages[group.name], due)
        return Kept(task.solution, tables)

    # --- what may go --------------------------------------------------------------------------

    def _free(self, task: Scheduling, criterion: Importance) -> list[Group]:
        """Candidates that may go; a note counts those of protected layers."""
        free = self._judged(task, task.candidates, criterion)
        protected = self._protected(task.candidates)
        if protected:
            task.notes.append(f"{len(protected)} groups of the first and last layers stay whole")
        if not free:
            raise self._nothing(task, task.candidates, criterion)
        return free

    def _judged(self, task: Scheduling, groups: Sequence[Group],
                criterion: Importance) -> list[Group]:
        """Groups outside of protected layers that the criterion can judge."""
        protected, adapted = self._protected(groups), self._adapted(task, groups)
        return [g for g in groups if g.name not in protected and (
            "adapter_steps" not in criterion.needs or g.name in adapted)]

    def _adapted(self, task: Scheduling, groups: Sequence[Group]) -> set[str]:
        """Groups that pass through a layer that an adapter fits on."""
        arrays = {f"{path}.weight" for path in adaptable(task.module, groups, self.targets)}
        return {g.name for g in groups if any(m.weight in arrays for m in g.members)}

    def _nothing(self, task: Scheduling, groups: Sequence[Group],
                 criterion: Importance) -> TargetError:
        """Why none of the groups may go, and the fewest options that would let some, by trial."""
        helps = (names for count in range(1, len(LETS_GO) + 1)
                 for names in combinations(LETS_GO, count)
                 for other in [replace(self, **{name: LETS_GO[name] for name in names})]
                 if other._adapted(task, groups) and other._judged(task, groups, criterion))
        names = next(helps, ())
        return TargetError(
            "nothing to prune", where=task.name,
            why=f"of {len(groups)} groups adapters fit on {len(self._adapted(task, groups))}, and "
                f"{len(self._protected(groups))} of the first and last layers stay whole",
            fix=f"lora-prune({', '.join(f'{name}={LETS_GO[name]!r}' for name in names)})"
                if names else ONE_SHOT)

    def _protected(self, groups: Sequence[Group]) -> set[str]:
        """Groups of the first and last of repeated layers (three or more of a kind)."""
        kinds: dict[str, list[Group]] = {}
        for group in groups:
            kinds.setdefault(family(group.name), []).append(group)
        found = set()
        for rows in kinds.values():
            if len(rows) >= 3:
                rows = sorted(rows, key=lambda g: [int(n) for n in re.findall(r"\d+", g.name)])
                first = int(self.protect_first * len(rows))
                last = max(0, len(rows) - self.protect_last)
                found |= {g.name for g in (*rows[:first], *rows[last:])}
        return found


def _unmasked(groups: Sequence[Group], places: Sequence[Site]) -> dict[str, str]:
    """Why each group cannot be masked where it is read, or ""."""
    read = {name for site in places for name, _ in site.reads}
    return {g.name: MASKED if any(r.how == "score" for r in g.reads) else
            "no module reads it as its first argument" if g.name not in read else ""
            for g in groups}


def _seen(task: Scheduling, places: Sequence[Site], asked: Sequence[Group]) -> list[Group]:
    """Candidates that can be masked where they are read; a note names the others.

    Raises TargetError if there is none; `asked` are all that the user would let go.
    """
    why = _unmasked(task.candidates, places)
    task.notes.extend(f"{name} stays: {reason}" for name, reason in why.items() if reason)
    if all(why.values()):
        names = {g.name for g in asked}
        others = [g for g in task.solution.groups.values() if g.name not in names]
        more = _unmasked(others, sites(task.module, task.trace, task.solution, others))
        raise TargetError("nothing to prune", where=task.name, why=task.notes[-1],
                          fix=ONE_SHOT if all(more.values()) else
                          f"let more go with --role or --only, or {ONE_SHOT}")
    return [g for g in task.candidates if not why[g.name]]


def _linear(step: int, total: int, warmup: int) -> float:
    """Up over the warm-up, then down to zero at the end."""
    return (step + 1) / warmup if step < warmup else max(0.0, (total - step) / (total - warmup))


def _endless(batches: Sequence[Batch], seed: int) -> Iterator[Any]:
    """Yield batches for ever, in a new seeded order each time.

    One generator draws all orders, as in the released code; recovery draws each epoch's from a seed
    of its own, so that it can be resumed in the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]
