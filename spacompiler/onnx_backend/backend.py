"""The steps of a compile for an ONNX file: nothing of the framework that made it is needed."""

from __future__ import annotations

from typing import Any, cast

from ..errors import UsageError
from ..groups.solution import Solution, solve
from ..rows.onnx_table import TABLE
from ..stages.records import Backend, Job
from . import prove as onnx_proof
from .biases import unbiased, with_biases
from .emit import rewrite
from .read.file import OnnxFile, check_finite, checked_feed
from .read.lower import OnnxTrace, trace
from .run.observe import fresh_context


def analyse(file: OnnxFile, inputs: Any, quick: bool = False) -> tuple[OnnxTrace, Solution]:
    """Lower the file at the sizes of the example inputs (or guessed ones) and solve its axes.

    A file is a program already: `quick` asks for nothing less.
    """
    del quick
    feeds = None
    if inputs:
        given = inputs if isinstance(inputs, dict) else dict(
            zip([v.name or "" for v in file.inputs()], inputs, strict=False))
        feeds = checked_feed(file, given)
    traced = trace(file, feeds)
    return traced, solve(traced.graph, TABLE)


def check_weights(job: Job) -> None:
    """Raise SpaError if a stored array is not finite; take example inputs from calibration."""
    file: Any = job.module
    first = next(iter(job.calibration.batches), ((), {}))
    if not job.inputs and any(first):
        job.inputs = first[1] or first[0]
    if job.recovery is not None or job.schedule is not None:
        raise UsageError("an ONNX file cannot be trained", why="ONNX Runtime computes forward only",
                         fix="leave out recovery, or train the torch model and export it")
    job.notes.extend(file.notes)
    check_finite(file, job.name)


def add_biases(job: Job) -> bool:
    """Let the job's file be a copy with zero biases where operators lack one; False if none does.
    """
    traced: Any = job.trace
    names = unbiased(traced, job.solution, job.candidates)
    if names:
        job.module = cast(Any, with_biases(traced, names))
    return bool(names)


def emit(job: Job) -> None:
    """Make the pruned model; its arrays are sliced when they are written."""
    job.pruned = rewrite(cast(Any, job.trace), job.solution, job.choices)
    job.layout, job.emission = "onnx", "graph"


BACKEND = Backend(
    kind="onnx", check_weights=check_weights, trace=analyse,
    context=lambda job: fresh_context(cast(Any, job.trace), job.solution, job.recipe.seed),
    digest=lambda job: cast(Any, job.module).digest,
    prove=lambda job: onnx_proof.prove(
        cast(Any, job.trace), job.solution, job.choices, seed=job.recipe.seed),
    emit=emit, add_biases=add_biases)
