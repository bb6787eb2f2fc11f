"""Targets in time: how long networks of given widths take in ONNX Runtime on this machine.

Times follow from widths by no formula, so they are measured: a table of (share of MACs, share of
the time), to which a network is added until one is at the target. Between its entries times are
taken to be linear. All are files as they would be deployed, timed turn by turn with the dense one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..axes.choices import Choices
from ..errors import SpaError, TargetError
from ..plan.plan import make_plan
from ..request.targets import LENGTH, Target
from ..runtime.latency import Latency, compare_latency, ratio
from ..stages.records import Request, Scored, Subject, Traced
from ..system.group import here
from ..system.staging import Scratch, orderly

Counts = tuple[dict[str, int], str]
CLOSE, TRIES, REPEATS = 0.02, 6, 30
"""The share of the time that a network may miss the target by; networks that are tried; turns."""
FINEST = 1e-3
"""Shares of MACs that are nearer than this to each other are one width."""
FIRST, LEAST = 0.7, 0.02
"""Shares of MACs: tried first where the dense network's time is not known, and at least."""
Table = list[tuple[float, float]]


def meet(target: Target, at: Callable[[float, list[str]], Counts], ask: Request, subject: Subject,
         traced: Traced, scored: Scored) -> Counts:
    """Return the counts whose network takes the time that is wanted.

    `at(share, notes)` allocates under a share of the MACs. Raises TargetError if none is fast
    enough.
    """
    table: Table = [(0.0, 0.0), (1.0, 1.0)]
    found: list[tuple[float, float, Counts, list[str]]] = []
    wanted = target.amount
    for _ in range(TRIES):
        notes: list[str] = []
        unknown = target.absolute and not found
        share = FIRST if unknown else max(LEAST, between(table, wanted))
        counts = at(share, notes)
        times = measured(target, ask, subject, traced, scored, counts[0])
        took = ratio(times["pruned"], times["dense"], cpu=True).median
        wanted = target.amount / times["dense"].best if target.absolute else target.amount
        found.append((abs(took - wanted), took, counts, notes))
        if abs(took - wanted) <= CLOSE or wanted >= 1:
            break
        if any(abs(share - x) < FINEST for x, _ in table):
            break  # steps are too coarse to come nearer
        table = sorted([*table, (share, took)])
    _, took, counts, notes = min(found, key=lambda one: one[0])
    if wanted >= 1 or (took - wanted > 2.5 * CLOSE and not target.nearest):
        raise _unmet(target, min(t for _, t, *_ in found), wanted, ask)
    ask.notes.extend([*notes, _said(target, took, wanted, len(found))])
    return counts


def between(table: Table, wanted: float) -> float:
    """Return the share of MACs at which a time is expected: linear between entries.

    >>> between([(0.0, 0.0), (0.5, 0.6), (1.0, 1.0)], 0.8)
    0.75
    """
    times = np.maximum.accumulate([t for _, t in table])
    i = min(max(1, bisect_left(times.tolist(), wanted)), len(table) - 1)
    (x0, _), (x1, _) = table[i - 1], table[i]
    t0, t1 = times[i - 1], times[i]
    inside = 0.5 if t1 <= t0 else min(1.0, max(0.0, (wanted - t0) / (t1 - t0)))
    return float(round(x0 + (x1 - x0) * inside, 6))


def holds(limit: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
          counts: Mapping[str, int]) -> bool:
    """Whether the network of some counts is as fast as a limit says."""
    times = measured(limit, ask, subject, traced, scored, counts)
    if limit.absolute:
        return times["pruned"].best <= limit.amount * (1 + 2 * CLOSE)
    return ratio(times["pruned"], times["dense"], cpu=True).median <= limit.amount + 2 * CLOSE


def share(ask: Request, subject: Subject, traced: Traced, scored: Scored,
          counts: Mapping[str, int]) -> float:
    """Return what share of the dense network's time the network of some counts takes."""
    times = measured(Target("latency", 1.0, length=LENGTH["latency"]), ask, subject, traced,
                     scored, counts)
    return ratio(times["pruned"], times["dense"], cpu=True).median


def _said(target: Target, took: float, wanted: float, tries: int) -> str:
    return (f"latency at batch {target.batch}, length {target.length}, one thread: {took:.1%} of "
            f"the dense network's ({wanted:.1%} wanted), measured on {tries} networks before "
            "repair")


def _unmet(target: Target, least: float, wanted: float, ask: Request) -> TargetError:
    if wanted >= 1:
        return TargetError(f"target {ask.recipe.target} takes nothing away", where=ask.name,
                           why=f"the dense network takes {1 / wanted:.1%} of that time",
                           fix="ask for less time")
    return TargetError(f"target {ask.recipe.target} cannot be met", where=ask.name,
                       why=f"the fastest network that was tried takes {least:.1%} of the dense "
                           f"one's time, {wanted:.1%} is wanted",
                       fix="let more go (--role, --only, --floor, --align 1), or take what is "
                           f"nearest: --target 'latency~{target.amount:.4g}'")


# --- files ----------------------------------------------------------------------------------------


def measured(target: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
             counts: Mapping[str, int]) -> Mapping[str, Latency]:
    """Time the network of some counts against the dense one, one thread each.

    Of several processes the first one does, and all go by its times.
    """
    ask.tell("timing widths", 0, 1)

    def times() -> dict[str, list[tuple[float, ...]]]:
        return {name: [took.wall_ms, took.cpu_ms] for name, took in _timed(
            target, ask, subject, traced, scored, counts).items()}

    return {name: Latency(tuple(wall), tuple(cpu))
            for name, (wall, cpu) in here().of_first(times, "times").items()}


def _timed(target: Target, ask: Request, subject: Subject, traced: Traced, scored: Scored,
           counts: Mapping[str, int]) -> Mapping[str, Latency]:
    choices = make_plan(scored.candidates, scored.scores, counts).choices(traced.solution)
    write = _WRITERS.get(subject.backend.kind)
    if write is None:
        raise SpaError(f"{subject.backend.kind} models cannot be timed", where=ask.name)
    with orderly(), Scratch() as folder:
        paths = {"dense": folder / "dense.onnx", "pruned": folder / "pruned.onnx"}
        feed = write(target, subject, traced, choices, paths)
        return compare_latency(paths, feed, threads=1, repeats=REPEATS)


def _torch(target: Target, subject: Subject, traced: Traced, choices: Choices,
           paths: dict[str, Path]) -> Mapping[str, np.ndarray]:
    from ..deploy.export import export_onnx
    from ..deploy.inputs import feed, timed_inputs
    from ..torch_backend.emit.program import rewrite

    trace = traced.trace
    names = trace.graph.inputs
    export_onnx(trace.exported, paths["dense"], input_names=names)
    export_onnx(rewrite(trace, traced.solution, choices, {}), paths["pruned"], input_names=names)
    return feed(trace, *timed_inputs(trace, target.batch, target.length))


def _onnx(target: Target, subject: Subject, traced: Traced, choices: Choices,
          paths: dict[str, Path]) -> Mapping[str, np.ndarray]:
    import onnx_ir as ir

    from ..onnx_backend.emit import rewrite

    ir.save(rewrite(traced.trace, traced.solution, choices), paths["pruned"])
    paths["dense"] = traced.trace.file.path
    feeds: Mapping[str, np.ndarray] = traced.trace.feeds
    return feeds


_WRITERS = {"torch": _torch, "onnx": _onnx}
"""What writes dense and pruned as ONNX files, and returns what to feed them, by backend."""
