"""A compile as one flat list of steps: each takes the records that it needs, and makes one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import ParamSpec, TypeVar

from torch import nn

from ..adapters import keeping
from ..adapters.merging import is_adapted
from ..errors import SpaError
from ..evidence.where import enough_memory, runs_out
from ..stages.compiled import Compiled
from ..stages.records import Decided, Emitted, Request, Scored, Subject, Traced
from ..system.group import Team, apart
from ..system.heap import give_back
from ..trials import depth, low_rank
from . import finish, prepare, recover
from .analyse import analyse
from .decide import decide
from .keep import working
from .score import scheduling, score

P = ParamSpec("P")
R = TypeVar("R")

STAGES = ("merging adapters", "checking weights", "continuing text", "dropping blocks",
          "factorising layers", "tracing and solving axes", "scoring", "allocating", "repairing",
          "finishing the schedule", "proving", "emitting",
          "setting the result apart", "keeping the adapter", "recovering", "comparing")
DRY_STAGES = STAGES[:STAGES.index("repairing")]
HELPING = STAGES[:STAGES.index("proving")]
"""What a process does that helps another one, which proves and writes."""
TRAINING = (*HELPING, "emitting", "setting the result apart", "recovering")
"""The same, where training is shared out."""
IN_MEMORY = (*HELPING[HELPING.index("factorising layers"):], "emitting")
ASKED: Mapping[str, Callable[[Request, Subject], bool]] = {
    "merging adapters": lambda ask, subject: bool(ask.recipe.adapters) or is_adapted(subject.model),
    "continuing text": lambda ask, _: ask.recipe.continued,
    "dropping blocks": lambda ask, _: bool(ask.recipe.blocks),
    "factorising layers": lambda ask, _: bool(ask.recipe.low_rank),
    "repairing": lambda ask, _: ask.compensation is not None,
    "finishing the schedule": lambda ask, _: hasattr(ask.schedule, "after"),
    "setting the result apart": lambda _, subject: isinstance(subject.given, nn.Module),
    "keeping the adapter": lambda ask, _: ask.recipe.keep_adapter,
    "recovering": lambda ask, _: ask.recovery is not None,
    "comparing": lambda ask, subject: ask.calibration.real and subject.backend.kind == "torch",
}
"""Stages that are told of only if they are asked for, most of them carried out only then."""


def run(ask: Request, subject: Subject, *, dry_run: bool = False,
        helps: bool = False) -> Compiled:
    """Compile a model as a request says; a dry run stops at the plan, a process that helps another
    one when nothing is left to share.

    Raises SpaError (TargetError, ProofError, ...) where the request cannot be carried out.
    """
    do = Walk(ask, subject, DRY_STAGES if dry_run else _helping(ask) if helps else STAGES)
    subject = do("merging adapters", prepare.merge_adapters, ask, subject)
    subject = do("checking weights", prepare.check_weights, ask, subject)
    if "continuing text" in do.stages:
        ask = do("continuing text", prepare.write_on, ask, subject)
    if "dropping blocks" in do.stages:
        subject = do("dropping blocks", depth.drop_blocks, ask, subject, in_memory)
    ask, subject = _factorised(do, ask, subject)
    ask, subject, traced = do("tracing and solving axes", analyse, ask, subject)
    with working(ask, subject, traced) as ask:
        return carry_on(do.knowing(ask, traced), subject, traced, dry_run=dry_run)


def _helping(ask: Request) -> tuple[str, ...]:
    """The stages of a process that helps another one."""
    trains = ask.recovery is not None and not recover.alone(ask)
    return TRAINING if trains else HELPING


def _factorised(do: Walk, ask: Request, subject: Subject) -> tuple[Request, Subject]:
    """Write layers as products of two, if that is asked for."""
    if "factorising layers" in do.stages:
        return do("factorising layers", low_rank.factorise, ask, subject)
    return ask, subject


def carry_on(do: Walk, subject: Subject, traced: Traced, *, dry_run: bool = False) -> Compiled:
    """The steps of a compile after the analysis."""
    ask = do.ask
    scored = do("scoring", score, ask, subject, traced)
    decided = do("allocating", decide, ask, subject, traced, scored)
    if dry_run:
        return Compiled(ask, subject, traced, scored, decided)
    if "repairing" in do.stages:
        decided = do("repairing", finish.repair, ask, subject, scored, decided)
    if "finishing the schedule" in do.stages:
        task = replace(scheduling(ask, subject, replace(traced, candidates=scored.candidates)),
                       scores=scored.scores)
        do("finishing the schedule", ask.schedule.after, task, decided.choices)
    scored = replace(scored, context=None)  # statistics are large, and nobody asks for them now
    if "emitting" not in do.stages:
        return Compiled(ask, subject, traced, scored, decided)
    with apart() as team:  # nothing is left to share but training
        return _made(do, subject, traced, scored, decided, team)


def _made(do: Walk, subject: Subject, traced: Traced, scored: Scored, decided: Decided,
          team: Team) -> Compiled:
    """The steps after the plan and the repair: prove, emit, train."""
    ask, proof = do.ask, None
    if "proving" in do.stages:
        proof = do("proving", finish.prove, ask, subject, decided)
    emitted = do("emitting", finish.emit, ask, subject, decided)
    if "setting the result apart" in do.stages:
        emitted = do("setting the result apart", finish.set_apart, emitted)
    if "keeping the adapter" in do.stages:
        emitted = do("keeping the adapter", keeping.keep, ask, emitted)
    if "recovering" in do.stages:
        emitted = do("recovering", recover.recover, ask, emitted, team,
                     helps="proving" not in do.stages)
    if "comparing" in do.stages:
        emitted = do("comparing", finish.compare, ask, emitted)
    return Compiled(ask, subject, traced, scored, decided, proof, emitted)


def in_memory(ask: Request, subject: Subject) -> Emitted:
    """The steps from tracing to the model in memory: for trials."""
    do = Walk(ask, subject, IN_MEMORY)
    ask, subject = _factorised(do, ask, subject)
    ask, subject, traced = do("tracing and solving axes", analyse, ask, subject)
    return carry_on(do.knowing(ask, traced), subject, traced).made


def resumed(ask: Request, subject: Subject, traced: Traced) -> Compiled:
    """Compile what is traced and analysed already, as a request says."""
    do = Walk(ask, subject, STAGES[STAGES.index("scoring"):])
    return carry_on(do.knowing(ask, traced), subject, traced)


class Walk:
    """Goes through stages: tells of each, seeds it, and says plainly where batches do not fit."""

    def __init__(self, ask: Request, subject: Subject, stages: tuple[str, ...]) -> None:
        self.ask = ask
        self.trace: object = None
        self.stages = [s for s in stages if s not in ASKED or ASKED[s](ask, subject)]

    def knowing(self, ask: Request, traced: Traced) -> Walk:
        """The same walk, once the analysis has settled the request and traced a program."""
        self.ask, self.trace = ask, traced.trace
        return self

    def __call__(self, stage: str, step: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Carry out one step."""
        if stage in self.stages:
            self.ask.tell(stage, self.stages.index(stage), len(self.stages))
        with _seeded(self.ask), enough_memory(self.ask.where), _fitting(self.ask, self.trace):
            result = partial(step, *args, **kwargs)()
        give_back()
        return result


REACHES = re.compile("index out of range in self|out of range for tensor|out of bounds for dim")
"""What torch says where a table is read beyond its end; a list's end is something else."""


@contextmanager
def _fitting(ask: Request, trace: object) -> Iterator[None]:
    """Say it plainly where a step fails on batches of other shapes than the program was traced at.

    Which ones it serves beside them is not always known before.
    """
    try:
        yield
    except IndexError as problem:
        if not REACHES.search(str(problem)):
            raise
        raise SpaError("a batch reaches beyond a table of the network", where=ask.name,
                       why=str(problem).splitlines()[0],
                       fix="a sequence may be longer than the network has positions "
                           "(--length), or a token beyond its vocabulary") from problem
    except RuntimeError as problem:
        if runs_out(problem):
            raise
        misfit = getattr(trace, "misfit", lambda *call: "")
        shapes = next(filter(None, (misfit(*call) for call in ask.calibration.for_repair)), "")
        if not shapes:
            raise
        raise SpaError("calibration inputs do not fit the example inputs", where=ask.name,
                       why=f"{shapes}: {str(problem).splitlines()[0]}",
                       fix="give batches of the example's shapes") from problem


def _seeded(ask: Request) -> AbstractContextManager[None]:
    """Seed torch's generators for one step and give the user's state back."""
    return ask.where.seeded(ask.recipe.seed)
