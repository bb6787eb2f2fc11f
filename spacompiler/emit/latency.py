"""Time ONNX models against each other with ONNX Runtime on the CPU.

A comparison has to survive a noisy machine: the models run turn by turn in one process, so that
drift hits all of them, and CPU time is kept beside wall time, so that a neighbour's load shows.
By default that process is a child (``python -m spacompiler.emit.latency``), so that the sessions
never count towards the caller's memory. This module therefore imports neither torch nor onnx.
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from spacompiler.errors import SpaError

Arrays = Mapping[str, np.ndarray]


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


def open_session(path: Path, *, threads: int = 1) -> ort.InferenceSession:
    """Open a model for the CPU at one fixed optimisation level, so that results compare.

    Spinning is off: idle threads that spin would count as CPU time.

    Raises:
        SpaError: the file is missing, or ONNX Runtime does not accept it.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise SpaError(
            what="ONNX Runtime cannot open the model",
            where=str(path),
            why=str(error),
            fix="check that the file and its .data file are complete and stand side by side",
        ) from error


def run_session(session: ort.InferenceSession, inputs: Arrays) -> list[np.ndarray]:
    """Run one forward pass; the outputs come in the order of the graph's outputs.

    Raises:
        SpaError: the inputs' names, types or shapes do not fit, or a kernel fails.
    """
    try:
        return session.run(None, dict(inputs))
    except Exception as error:
        wanted = ", ".join(f"{i.name}: {i.type} {i.shape}" for i in session.get_inputs())
        given = ", ".join(f"{k}: {v.dtype} {list(v.shape)}" for k, v in inputs.items())
        raise SpaError(
            what="the ONNX model does not run on these inputs",
            why=f"it takes ({wanted}) and was given ({given}): {error}",
            fix="pass one array for every graph input, of its type and fixed sizes",
        ) from error


def measure(
    paths: Mapping[str, Path], inputs: Arrays, *, threads: int, repeats: int, warmup: int
) -> dict[str, Latency]:
    """Time the models in this process, round by round, in alternating order.

    All sessions are open at once, for interleaving needs them: the memory is the models' sum.

    Raises:
        SpaError: a model cannot be opened or does not run on the inputs.
    """
    sessions = {name: open_session(path, threads=threads) for name, path in paths.items()}
    for session in sessions.values():
        for _ in range(max(1, warmup)):
            run_session(session, inputs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sessions}
    for turn in range(repeats):
        for name in list(sessions)[:: -1 if turn % 2 else 1]:
            times[name].append(_time_once(sessions[name], inputs))
    return {n: Latency(tuple(w for w, _ in t), tuple(c for _, c in t)) for n, t in times.items()}


def _time_once(session: ort.InferenceSession, inputs: Arrays) -> tuple[float, float]:
    """Wall and process CPU time of one run, in milliseconds."""
    feed = dict(inputs)
    wall, cpu = time.perf_counter(), time.process_time()
    session.run(None, feed)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def compare_latency(
    paths: Mapping[str, Path],
    inputs: Arrays,
    *,
    threads: int = 1,
    repeats: int = 20,
    warmup: int = 3,
    isolate: bool = True,
) -> dict[str, Latency]:
    """Time several ONNX models on the same inputs; the result has the keys of ``paths``.

    ``isolate`` runs them in a child process, which keeps the caller's memory and the timings
    apart from each other; switch it off where processes cannot be started.

    Raises:
        SpaError: ``repeats`` is below 1, a model cannot be opened or does not run.
    """
    if repeats < 1 or threads < 1:
        raise SpaError(
            what="nothing to time",
            why=f"repeats={repeats}, threads={threads}; both must be at least 1",
            fix="raise repeats and threads to 1 or more",
        )
    options = {"threads": threads, "repeats": repeats, "warmup": warmup}
    if not isolate:
        return measure(paths, inputs, **options)
    request = {"paths": {n: str(Path(p).absolute()) for n, p in paths.items()}, **options}
    reply = _ask_child({**request, "inputs": {n: _pack(a) for n, a in inputs.items()}})
    return {n: Latency(tuple(t["wall_ms"]), tuple(t["cpu_ms"])) for n, t in reply.items()}


def _ask_child(request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to a child that runs this module; its failure becomes a SpaError."""
    root = str(Path(__file__).absolute().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-W", "ignore", "-m", "spacompiler.emit.latency"]
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
    return reply["latency"]


def _last_json(text: str) -> dict[str, Any] | None:
    """The child's reply: its last line, for imported packages may print before it."""
    lines = text.strip().splitlines()
    try:
        reply = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None
    return reply if isinstance(reply, dict) else None


def _pack(array: np.ndarray) -> dict[str, Any]:
    """An array as JSON, bit for bit."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def _unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The inverse of :func:`_pack`."""
    flat = np.frombuffer(base64.b64decode(packed["data"]), dtype=np.dtype(packed["dtype"]))
    return flat.reshape(packed["shape"])


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a request asks; errors travel back as the fields of a SpaError."""
    inputs = {name: _unpack(packed) for name, packed in request["inputs"].items()}
    paths = {name: Path(path) for name, path in request["paths"].items()}
    options = {key: request[key] for key in ("threads", "repeats", "warmup")}
    try:
        found = measure(paths, inputs, **options)
    except SpaError as error:
        return {"error": {key: getattr(error, key, "") for key in ("what", "where", "why", "fix")}}
    times = {n: {"wall_ms": t.wall_ms, "cpu_ms": t.cpu_ms} for n, t in found.items()}
    return {"latency": times}


def main(arguments: Sequence[str] = ()) -> int:
    """Read a request from standard input and print the reply on one line."""
    reply = _answer(json.load(sys.stdin))
    print(json.dumps(reply), flush=True)
    return 0 if "latency" in reply else 1


if __name__ == "__main__":
    sys.exit(main())
