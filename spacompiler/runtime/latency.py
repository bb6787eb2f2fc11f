"""Time ONNX models against each other with ONNX Runtime on the CPU.

A comparison has to survive a noisy machine: the models run turn by turn in one process, so that
drift hits all of them, and CPU time is kept beside wall time, so that a neighbour's load shows.
Ratios are taken turn by turn too: :func:`ratio` gives their median and quartiles.
By default that process is a child (``python -m spacompiler.runtime.latency``), so that the sessions
never count towards the caller's memory. This module therefore imports neither torch nor onnx.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from ..errors import SpaError
from ..system.staging import Scratch, orderly, told
from .session import Arrays, open_session, run_session

LEAST_TURNS = 5
"""Turns that there are in any case."""
WARM = 0.2
"""Seconds of a model after which it is warm, however many runs that were."""


@dataclass(frozen=True)
class Latency:
    """One model's times, in milliseconds, one entry for every timed run in the order of running.

    ``cpu_ms`` sums over the threads of the process: with several threads it exceeds ``wall_ms``.
    """

    wall_ms: tuple[float, ...]
    cpu_ms: tuple[float, ...]

    @property
    def repeats(self) -> int:
        """How many timed runs there are."""
        return len(self.wall_ms)

    @property
    def median(self) -> float:
        """Median wall time in milliseconds: what a user of this machine would see."""
        return statistics.median(self.wall_ms)

    @property
    def best(self) -> float:
        """Shortest wall time in milliseconds: the least disturbed run."""
        return min(self.wall_ms)

    @property
    def cpu_median(self) -> float:
        """Median CPU time in milliseconds: hardly moved by other processes."""
        return statistics.median(self.cpu_ms)

    @property
    def cpu_best(self) -> float:
        """Shortest CPU time in milliseconds."""
        return min(self.cpu_ms)


class Ratio(NamedTuple):
    """Median and quartiles of one model's times over another's, turn by turn."""

    median: float
    low: float
    high: float


def ratio(one: Latency, other: Latency, *, cpu: bool = False) -> Ratio:
    """Return how long `one` takes for each unit of time of `other`: below 1 is faster.

    Both must come from the same measurement. `cpu` compares CPU instead of wall time.
    """
    pairs = zip(one.cpu_ms, other.cpu_ms, strict=True) if cpu else \
        zip(one.wall_ms, other.wall_ms, strict=True)
    low, median, high = np.percentile([a / max(b, 1e-6) for a, b in pairs], (25, 50, 75))
    return Ratio(float(median), float(low), float(high))


def measure(
    paths: Mapping[str, Path],
    cases: Mapping[str, Mapping[str, Arrays]],
    *,
    threads: int,
    repeats: int,
    warmup: int,
    seconds: float,
    steady: float = 0.0,
) -> dict[str, dict[str, Latency]]:
    """Time the models in this process, round by round, in alternating order.

    All sessions are open at once, for interleaving needs them: the memory is the models' sum.

    Raises:
        SpaError: a model cannot be opened or does not run on the inputs.
    """
    sessions = {name: open_session(path, threads=threads) for name, path in paths.items()}
    return {case: _measure_case(sessions, inputs, repeats, warmup, seconds, steady)
            for case, inputs in cases.items()}


def _measure_case(
    sessions: Mapping[str, ort.InferenceSession],
    inputs: Mapping[str, Arrays],
    repeats: int,
    warmup: int,
    seconds: float,
    steady: float,
) -> dict[str, Latency]:
    for name, session in sessions.items():
        begun = time.process_time()
        for _ in range(max(1, warmup)):
            run_session(session, inputs[name])
            if time.process_time() - begun > WARM:
                break
    feeds = {n: {k: ort.OrtValue.ortvalue_from_numpy(a) for k, a in inputs[n].items()}
             for n in sessions}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    started = time.perf_counter()
    for turn in range(repeats):
        if turn >= LEAST_TURNS and time.perf_counter() - started > seconds:
            break
        if turn >= LEAST_TURNS and _spread(list(times.values())) <= steady:
            break
        for name in list(sessions)[:: -1 if turn % 2 else 1]:
            times[name].append(_time_once(sessions[name], feeds[name]))
    return {n: Latency(tuple(w for w, _ in t), tuple(c for _, c in t)) for n, t in times.items()}


def _spread(times: Sequence[Sequence[tuple[float, float]]]) -> float:
    """How far the median ratio of CPU times to the first model's may be off, as a share of it.

    Half the distance of the quartiles over the root of the turns: about its standard error.
    """
    worst = 0.0
    for other in times[1:]:
        ratios = [b / max(a, 1e-6) for (_, a), (_, b) in zip(times[0], other, strict=True)]
        low, median, high = np.percentile(ratios, (25, 50, 75))
        worst = max(worst, float((high - low) / 2 / max(median, 1e-6) / len(ratios) ** 0.5))
    return worst if len(times) > 1 else float("inf")


def _time_once(session: ort.InferenceSession, feed: dict[str, ort.OrtValue]) -> tuple[float, float]:
    """Wall and process CPU time of one run, in milliseconds; results stay where they are made."""
    wall, cpu = time.perf_counter(), time.process_time()
    session.run_with_ort_values(None, feed)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def compare_latency(
    paths: Mapping[str, Path],
    inputs: Arrays,
    *,
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 3,
    steady: float = 0.0,
    isolate: bool = True,
) -> dict[str, Latency]:
    """Time several ONNX models on the same inputs; the result has the keys of ``paths``.

    As :func:`compare_cases`, of one case and one number of threads.
    """
    cases = {"": {name: inputs for name in paths}}
    return compare_cases(paths, cases, threads=(threads,), repeats=repeats, warmup=warmup,
                         steady=steady, isolate=isolate)["", threads]


def compare_cases(
    paths: Mapping[str, Path],
    cases: Mapping[str, Mapping[str, Arrays]],
    *,
    threads: Sequence[int] = (1,),
    repeats: int = 20,
    warmup: int = 3,
    seconds: float = float("inf"),
    steady: float = 0.0,
    isolate: bool = True,
) -> dict[tuple[str, int], dict[str, Latency]]:
    """Time several ONNX models in several cases: {(case, threads): {model: times}}.

    Args:
        paths: the models, by name.
        cases: for each case the inputs of each model.
        threads: numbers of threads inside an operator to try, one after the other.
        repeats: timed turns of each case; in one turn every model runs once.
        warmup: runs of each model before, fewer if they take long.
        seconds: no new turn begins after this time, if at least five are done.
        steady: nor once the median ratio to the first model is known to this share (see
            `_spread`); 0 takes all turns.
        isolate: measure in a child process, which keeps the caller's memory and the timings apart
            from each other; switch it off where processes cannot be started.

    Raises:
        SpaError: ``repeats`` is below 1, a model cannot be opened or does not run.
    """
    _check_turns(repeats, threads)
    options = {"repeats": repeats, "warmup": warmup, "seconds": seconds, "steady": steady}
    found = {}
    for count in threads:
        if isolate:
            times = _ask_child(paths, cases, {"threads": count, **options})
        else:
            times = measure(paths, cases, threads=count, **options)  # type: ignore[arg-type]
        found.update({(case, count): latencies for case, latencies in times.items()})
    return found


def _check_turns(repeats: int, threads: Sequence[int]) -> None:
    if repeats < 1 or min(threads) < 1:
        raise SpaError(
            what="nothing to time",
            why=f"repeats={repeats}, threads={min(threads)}; both must be at least 1",
            fix="raise repeats and threads to 1 or more",
        )


def _ask_child(paths: Mapping[str, Path], cases: Mapping[str, Mapping[str, Arrays]],
               options: dict[str, Any]) -> dict[str, dict[str, Latency]]:
    """Let a child that runs this module measure; its failure becomes a SpaError."""
    root = str(Path(__file__).absolute().parents[2])
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = os.pathsep.join([root, *filter(os.path.isabs, given)])  # never the current folder
    command = [sys.executable, "-P", "-W", "ignore", "-m", "spacompiler.runtime.latency"]
    with orderly(), Scratch() as folder:
        with told("a temporary file", folder):
            stored = _store(cases, folder)
        request = {"paths": {n: str(Path(p).absolute()) for n, p in paths.items()},
                   "cases": stored, "options": options}
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
    reply = _last_json(done.stdout)
    if reply is None or "latency" not in reply:
        error = (reply or {}).get("error") or {"why": done.stderr.strip()[-2000:]}
        raise SpaError(**{"what": "the latency measurement failed", **error})
    return {case: {n: Latency(tuple(t["wall_ms"]), tuple(t["cpu_ms"])) for n, t in times.items()}
            for case, times in reply["latency"].items()}


def _last_json(text: str) -> dict[str, Any] | None:
    """The child's reply: its last line, for imported packages may print before it."""
    lines = text.strip().splitlines()
    try:
        reply = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return reply if isinstance(reply, dict) else None


def _store(cases: Mapping[str, Mapping[str, Arrays]], folder: Path) -> dict[str, dict[str, str]]:
    """Put inputs into files; equal ones (the same object) once."""
    places: dict[int, str] = {}
    for models in cases.values():
        for inputs in models.values():
            if id(inputs) not in places:
                places[id(inputs)] = str(folder / f"{len(places)}.npz")
                with open(places[id(inputs)], "wb") as file:
                    np.savez(file, allow_pickle=False, **dict(inputs))
    return {case: {name: places[id(inputs)] for name, inputs in models.items()}
            for case, models in cases.items()}


def _fetch(file: str) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks; errors travel back as the fields of a SpaError."""
    paths = {name: Path(path) for name, path in request["paths"].items()}
    cases = {case: {name: _fetch(file) for name, file in models.items()}
             for case, models in request["cases"].items()}
    try:
        found = measure(paths, cases, **request["options"])
    except SpaError as error:
        return {"error": {key: getattr(error, key, "") for key in ("what", "where", "why", "fix")}}
    return {"latency": {
        case: {n: {"wall_ms": t.wall_ms, "cpu_ms": t.cpu_ms} for n, t in times.items()}
        for case, times in found.items()}}


def main(arguments: Sequence[str] = ()) -> int:
    """Read a request from standard input and print the reply on one line."""
    reply = _answer(json.load(sys.stdin))
    print(json.dumps(reply), flush=True)
    return 0 if "latency" in reply else 1


if __name__ == "__main__":
    sys.exit(main())
