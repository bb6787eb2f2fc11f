"""The steps of a compile for an ONNX file: nothing of the framework that made it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..groups.solution import Solution, solve
from ..rows.onnx_table import TABLE
from ..stages.backend import Backend
from ..stages.proof import Proof
from ..stages.records import Decided, Emitted, Subject, Traced
from . import prove as onnx_proof
from .biases import unbiased, with_biases
from .emit import rewrite
from .module import opened
from .read.file import OnnxFile, check_finite, checked_feed
from .read.lower import trace
from .read.trace import OnnxTrace
from .run.observe import fresh_context


def analyse(file: OnnxFile, inputs: Mapping[str, object] | Sequence[object] | None,
            quick: bool = False, checked: bool = False) -> tuple[OnnxTrace, Solution]:
    """Lower the file at the sizes of the example inputs (or guessed ones) and solve its axes.

    A file is a program already: `quick` asks for nothing less, and nothing is to be `checked`.
    """
    del quick, checked
    feeds = None
    if inputs:
        given = inputs if isinstance(inputs, dict) else dict(
            zip([v.name or "" for v in file.inputs()], inputs, strict=False))
        feeds = checked_feed(file, given)
    traced = trace(file, feeds)
    return traced, solve(traced.graph, TABLE)


def check(file: OnnxFile, where: str) -> None:
    """Raise SpaError if a stored array is not finite."""
    check_finite(file, where)


def add_biases(file: OnnxFile, traced: Traced, owned: bool) -> OnnxFile | None:
    """Return a copy of a file with zero biases where operators lack one; None if none does."""
    del file, owned
    names = unbiased(traced.trace, traced.solution, traced.candidates)
    return with_biases(traced.trace, names) if names else None


def emit(subject: Subject, decided: Decided, layout: str, notes: list[str]) -> Emitted:
    """Make the pruned model; its arrays are sliced when they are written."""
    del layout, notes
    model = rewrite(decided.trace, decided.solution, decided.choices)
    return Emitted(model, "onnx", "graph", decided, subject)


def prove(file: OnnxFile, decided: Decided, seed: int) -> Proof:
    """Compare the masked dense model with the pruned one, and with a wrong index."""
    del file
    return onnx_proof.prove(decided.trace, decided.solution, decided.choices, seed=seed)


BACKEND = Backend(
    kind="onnx", check=check, trace=analyse, context=fresh_context,
    digest=lambda file: file.digest, prove=prove, emit=emit,
    module=opened, add_biases=add_biases)
