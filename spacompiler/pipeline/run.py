"""Carry out the steps of a compile that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import SpaError
from ..stages.records import Job
from .decide import decide
from .steps import (
    analyse,
    check_weights,
    emit,
    keep_adapter,
    mend,
    merge_adapters,
    prove_plan,
    recover,
    score,
    set_apart,
    write_on,
)


def drop_blocks(job: Job) -> None:
    """Take whole blocks out before anything is traced; `auto` compiles copies in memory."""
    from ..trials import depth

    depth.drop_blocks(job, lambda copy: carry_out(copy, _IN_MEMORY))


STEPS: tuple[tuple[str, Callable[[Job], None]], ...] = (
    ("merging adapters", merge_adapters),
    ("checking weights", check_weights),
    ("continuing text", write_on),
    ("dropping blocks", drop_blocks),
    ("tracing and solving axes", analyse),
    ("scoring", score),
    ("allocating", decide),
    ("repairing", mend),
    ("proving", prove_plan),
    ("emitting", emit),
    ("setting the result apart", set_apart),
    ("keeping the adapter", keep_adapter),
    ("recovering", recover),
)


DRY_STEPS = 7


_IN_MEMORY = [(stage, step) for stage, step in STEPS if step in (
    analyse, score, decide, mend, emit)]


ASKED: Mapping[str, Callable[[Job], bool]] = {
    "continuing text": lambda job: job.recipe.continued,
    "dropping blocks": lambda job: bool(job.recipe.blocks),
    "repairing": lambda job: job.compensation is not None,
    "setting the result apart": lambda job: isinstance(job.given, nn.Module),
    "keeping the adapter": lambda job: job.recipe.keep_adapter,
    "recovering": lambda job: job.recovery is not None,
}
"""Steps that are carried out only if they are asked for."""


def run(job: Job, *, dry_run: bool = False) -> Job:
    """Carry out the steps that are asked for; a dry run stops at the plan."""
    return carry_out(job, STEPS[:DRY_STEPS] if dry_run else STEPS)


def carry_out(job: Job, steps: Iterable[tuple[str, Callable[[Job], None]]]) -> Job:
    """Carry out those of some steps that are asked for."""
    asked = [(stage, step) for stage, step in steps if stage not in ASKED or ASKED[stage](job)]
    for i, (stage, step) in enumerate(asked):
        job.progress(stage, i, len(asked))
        with _settings(job.recipe.seed), _fitting(job):
            step(job)
    return job


@contextmanager
def _fitting(job: Job) -> Iterator[None]:
    """Say it plainly where a step fails on batches of other shapes than the program was traced at.

    Which ones it serves beside them is not always known before.
    """
    try:
        yield
    except IndexError as problem:
        if "index out of range" not in str(problem):
            raise
        raise SpaError("a batch reaches beyond a table of the network", where=job.name,
                       why=str(problem).splitlines()[0],
                       fix="a sequence may be longer than the network has positions "
                           "(--length), or a token beyond its vocabulary") from problem
    except RuntimeError as problem:
        misfit = getattr(job.trace, "misfit", lambda *call: "")
        shapes = next(filter(None, (misfit(*call) for call in job.calibration.for_repair)), "")
        if not shapes:
            raise
        raise SpaError("calibration inputs do not fit the example inputs", where=job.name,
                       why=f"{shapes}: {str(problem).splitlines()[0]}",
                       fix="give batches of the example's shapes") from problem


@contextmanager
def _settings(seed: int) -> Iterator[None]:
    """Seed torch's generator for one step and give the user's state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
