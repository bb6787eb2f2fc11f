"""Several processes on one compile: the same bytes for any number of them, and how long it takes.

    python benchmarks/ranks.py [--ranks 1,2,4] [--only NAME;...] [--threads 1] [--kills 12]

Each case is compiled by one process, by two, by four (gloo on this machine), and the directories
are compared file by file. Seconds are those of scoring and repairing, on a machine that should have
a core for each process: else they say nothing.

With --kills, a compile with `work=` is killed that many times at random moments and then let
finish: its files must be those of one that nobody killed. And of two processes one is killed, one
stopped: the other must end by itself with one error and leave nothing.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN: dict[str, Any] = {"align": 1, "latency": False, "onnx": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, taylor and refit": ("zoo:llama-gqa", {"target": "body=60%"}),
    "llama, obs, covariances one by one": ("zoo:llama-gqa", {
        "target": "body=60%", "importance": "obs", "repair": "refit"}),
    "llama, fluctuation and bias": ("zoo:llama-gqa", {
        "target": "body=60%", "importance": "fluctuation", "repair": "bias"}),
    "llama, curvature and measured": ("zoo:llama-gqa", {
        "target": "body=60%", "importance": "curvature", "allocation": "measured"}),
    "llama, relevance": ("zoo:llama-gqa", {"target": "body=60%", "importance": "relevance"}),
    "llama, squares of gradients": ("zoo:llama-gqa", {"target": "body=60%", "importance": "gblm"}),
    "mixture, wanda": ("zoo:moe", {"target": "body=60%", "importance": "wanda"}),
    "resnet, refit in sequence": ("zoo:resnet", {
        "target": "macs=60%", "repair": "refit(sequential=True)"}),
    "resnet, elements": ("zoo:resnet", {
        "target": "macs=60%", "importance": "taylor-element"}),
    "mlp, then its ONNX file, wanda": ("zoo:mlp", {"target": "params=70%", "onnx": True}),
}


def child(folder: Path, names: list[str]) -> None:
    """Compile every case together with the others that were started, and write the times."""
    import spacompiler

    took = {}
    for name in names:
        model, options = CASES[name]
        out, began, stages = folder / _file(name), time.perf_counter(), []
        spacompiler.compile(
            model, **{**PLAIN, **options}, calibration=_batches(folder.parent, model), out=out,
            processes="together", quiet=True,
            progress=lambda stage, done, total, to=stages: to.append((time.perf_counter(), stage)))
        took[name] = {"all": time.perf_counter() - began, "shared": _shared(stages)}
        if options.get("onnx"):
            spacompiler.compile(str(out / "model.onnx"), **PLAIN, target="params=80%",
                                importance="wanda", calibration=_batches(folder.parent, model),
                                out=folder / (_file(name) + "-onnx"), processes="together")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    if os.environ.get("RANK", "0") == "0":
        (folder / "times.json").write_text(json.dumps(took))
    (folder / f"cpu-{os.environ.get('RANK', '0')}").write_text(
        str(usage.ru_utime + usage.ru_stime))


def _shared(stages: list[tuple[float, str]]) -> float:
    """Seconds of the stages whose work is shared out."""
    ends = [at for at, _ in stages[1:] + stages[-1:]]  # only the first process tells of stages
    return sum(end - at for (at, stage), end in zip(stages, ends, strict=True)
               if stage in ("scoring", "calibrating", "repairing"))


def _batches(folder: Path, model: str) -> str:
    """Inputs for a model of the zoo in files, the same in every process."""
    import numpy as np
    import torch

    from spacompiler.models_zoo import load

    made = folder / f"batches-{model.removeprefix('zoo:')}"
    if not made.exists():
        _, inputs = load(model.removeprefix("zoo:")).build()
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
        draw = torch.Generator().manual_seed(0)
        made.mkdir(exist_ok=True)
        for i in range(7):
            if ids is None:
                np.save(made / f"{i}.npy", torch.randn(inputs[0].shape, generator=draw).numpy())
            else:
                np.savez(made / f"{i}.npz", input_ids=torch.randint(
                    0, int(ids.max()), ids.shape, generator=draw).numpy())
    return str(made)


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def start(size: int, folder: Path, names: list[str], threads: int) -> None:
    """Start the processes of a run, as a launcher would, and wait for them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    folder.mkdir()
    for name in names:
        _batches(folder.parent, CASES[name][0])
    running = [subprocess.Popen(
        [sys.executable, __file__, "--child", str(folder), "--only", ";".join(names)],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}) for rank in range(size)]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{size} processes ended with {codes}")


def differences(one: Path, other: Path) -> list[str]:
    """Return the files of two directories that are not equal byte by byte."""
    names = {str(p.relative_to(d)) for d in (one, other) for p in d.rglob("*") if p.is_file()
             and not p.name.startswith(("times", "cpu"))}
    return [n for n in sorted(names) if not (one / n).is_file() or not (other / n).is_file()
            or not filecmp.cmp(one / n, other / n, shallow=False)]


def main() -> None:
    """Compare runs of several sizes."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--ranks", default="1,2,4")
    words.add_argument("--only", default="")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--child", type=Path)
    words.add_argument("--kills", type=int, default=0)
    asked = words.parse_args()
    names = [n for n in CASES if not asked.only or n in asked.only.split(";")]
    if asked.child:
        child(asked.child, names)
        return
    if asked.kills:
        killed(asked.kills)
        ended_by("killed", signal.SIGKILL)
        ended_by("stopped", signal.SIGSTOP)
        return
    sizes = [int(n) for n in asked.ranks.split(",")]
    with tempfile.TemporaryDirectory() as place:
        for size in sizes:
            start(size, Path(place, str(size)), names, asked.threads)
        _tell(Path(place), sizes, names)


# --- killed ---------------------------------------------------------------------------------------


def forked(work: Callable[[], object]) -> int:
    """Do something in a fork of this process, which ends with 0, or 1 after a problem."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    except BaseException as problem:
        print(f"  {type(problem).__name__}: {problem}", flush=True)
        os._exit(1)


def killed(times: int) -> None:
    """Kill a compile again and again, let it finish, and compare with one that nobody killed."""
    import spacompiler

    model, options = CASES["llama, curvature and measured"]
    with tempfile.TemporaryDirectory() as folder:
        place, draw = Path(folder), random.Random(0)
        data = _batches(place, model)

        def compile(name: str, work: Path | None) -> None:
            spacompiler.compile(model, **{**PLAIN, **options}, out=place / name, work=work,
                                calibration=data, quiet=True)

        began = time.perf_counter()
        os.waitpid(forked(lambda: compile("plain", None)), 0)
        whole, kept = time.perf_counter() - began, []
        for i in range(times):
            child = forked(lambda: compile("out", place / "work"))
            time.sleep(whole * (i + draw.random()) / times)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kept.append(len(list((place / "work").glob("*.safetensors"))))
            if (place / "out").exists():
                break
        if not (place / "out").exists():
            os.waitpid(forked(lambda: compile("out", place / "work")), 0)
        print(f"killed {len(kept)} times within {whole:.1f} s each (entries kept: {kept}): "
              f"different files {differences(place / 'plain', place / 'out')}")


def ended_by(how: str, number: signal.Signals) -> None:
    """Signal one of two processes in the middle, and say how the other one ended."""
    import spacompiler

    model, options = CASES["llama, curvature and measured"]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        data = _batches(Path(folder), model)

        def said(stage: str, done: int, total: int) -> None:
            Path(folder, "stage").write_text(stage)

        def compile(rank: int) -> None:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port), SPACOMPILER_SILENCE="8")
            spacompiler.compile(model, **{**PLAIN, **options}, out=Path(folder, "out"), quiet=True,
                                calibration=data, processes="together", progress=said)

        one, other = forked(lambda: compile(0)), forked(lambda: compile(1))
        while not (at := Path(folder, "stage")).exists() or "calibrating" not in at.read_text():
            time.sleep(0.01)
        os.kill(other, number)
        began = time.perf_counter()
        _, code = os.waitpid(one, 0)
        left = {p.name for p in Path(folder).iterdir()} - {"stage", Path(data).name}
        print(f"one of two {how}: the other ended with {os.waitstatus_to_exitcode(code)} after "
              f"{time.perf_counter() - began:.1f} s; left: {sorted(left)}")
        if number == signal.SIGSTOP:
            os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def _tell(place: Path, sizes: list[int], names: list[str]) -> None:
    base = place / str(sizes[0])
    times = {n: json.loads((place / str(n) / "times.json").read_text()) for n in sizes}
    cpu = {n: sum(float(p.read_text()) for p in (place / str(n)).glob("cpu-*")) for n in sizes}
    for name in names:
        apart = {n: [d for d in differences(base, place / str(n)) if d.startswith(_file(name))]
                 for n in sizes[1:]}
        same = "equal bytes" if not any(apart.values()) else f"DIFFERENT {apart}"
        print(f"{name:36} {same}; scoring and repairing took " + ", ".join(
            f"{times[n][name]['shared']:.2f} s by {n}" for n in sizes))
    print("CPU seconds, all processes: " + ", ".join(f"{cpu[n]:.1f} by {n}" for n in sizes))


if __name__ == "__main__":
    main()
