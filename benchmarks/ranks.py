"""Several processes on one compile: the same bytes for any number of them, and how long it takes.

    python benchmarks/ranks.py [--ranks 1,2,4] [--only NAME;...] [--threads 1]
    python benchmarks/ranks.py --speed [--turns 2]
    python benchmarks/ranks.py --kills 12

Each case is compiled by one process, by two, by four (gloo on this machine), and the directories
are compared file by file. Seconds are those of scoring and repairing, on a machine that should have
a core for each process: else they say nothing.

--speed calibrates SmolLM2-135M (24 batches of 2 x 128 tokens, `taylor`, refit) by one process and
by two, turn by turn, on a machine that has nothing else to do: the bar is 0.65 of the time, and
equal bytes.

With --kills, a compile with `work=`, training included, is killed that many times at random moments
and then let finish: its files must be those of one that nobody killed. The same with one, two or
three processes drawn each time, of which one is killed: the others must end by themselves with an
error, and what finishes in the end must be the same files. And of two processes one is killed, one
stopped, one slow, one without room on its disk: the other must end by itself with one error and
leave nothing, or wait.
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
from functools import partial
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
    "llama, wanda, then trained": ("zoo:llama-gqa", {
        "target": "body=60%", "importance": "wanda", "recovery": "lora(lr=1e-2, dropout=0.1)"}),
}
SPEED: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m, taylor and refit": ("zoo:smollm2-135m", {"target": "body=60%", "prove": False})}
COUNTS = {"zoo:smollm2-135m": (24, (2, 128))}
"""How many batches of which shape, where it is not seven of the example's."""
BAR = 0.65


def child(folder: Path, names: list[str]) -> None:
    """Compile every case together with the others that were started, and write the times."""
    import spacompiler

    took = {}
    for name in names:
        model, options = {**CASES, **SPEED}[name]
        data = _batches(folder.parent, model)
        more = {"recover_data": data} if "recovery" in options else {}
        out, began, stages = folder / _file(name), time.perf_counter(), []
        spacompiler.compile(
            model, **{**PLAIN, **options, **more}, calibration=data, out=out,
            processes="together", quiet=True,
            progress=lambda stage, done, total, to=stages: to.append((time.perf_counter(), stage)))
        took[name] = {"all": time.perf_counter() - began, "shared": _shared(stages)}
        if options.get("onnx"):
            spacompiler.compile(str(out / "model.onnx"), **PLAIN, target="params=80%",
                                importance="wanda", calibration=data,
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
               if stage.startswith(("scoring", "calibrating", "repairing", "recovering",
                                    "training")))


def _batches(folder: Path, model: str) -> str:
    """Inputs for a model of the zoo in files, the same in every process."""
    import numpy as np
    import torch

    from spacompiler.sources.named import load

    made = folder / f"batches-{model.removeprefix('zoo:')}"
    if not made.exists():
        inputs = load(model).inputs
        count, shape = COUNTS.get(model, (7, None))
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
        draw = torch.Generator().manual_seed(0)
        made.mkdir(exist_ok=True)
        for i in range(count):
            if ids is None:
                np.save(made / f"{i}.npy", torch.randn(inputs[0].shape, generator=draw).numpy())
            else:
                np.savez(made / f"{i}.npz", input_ids=torch.randint(
                    0, int(ids.max()), shape or ids.shape, generator=draw).numpy())
    return str(made)


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def start(size: int, folder: Path, names: list[str], threads: int) -> None:
    """Start the processes of a run, as a launcher would, and wait for them."""
    port = free()
    folder.mkdir()
    for name in names:
        _batches(folder.parent, {**CASES, **SPEED}[name][0])
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
    words.add_argument("--speed", action="store_true")
    words.add_argument("--turns", type=int, default=2)
    asked = words.parse_args()
    names = [n for n in (*CASES, *SPEED) if n in asked.only.split(";")] or [*CASES]
    if asked.child:
        child(asked.child, names)
        return
    if asked.speed:
        raise SystemExit(speed(asked.turns, asked.threads))
    if asked.kills:
        kills(asked.kills)
        return
    sizes = [int(n) for n in asked.ranks.split(",")]
    with tempfile.TemporaryDirectory() as place:
        for size in sizes:
            start(size, Path(place, str(size)), names, asked.threads)
        _tell(Path(place), sizes, names)


def speed(turns: int, threads: int) -> int:
    """Compare the seconds of one process with those of two; 0 if the bar is met."""
    (name,) = SPEED
    took: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place, "0-1")
        for turn in range(turns):
            for size in took:
                folder = Path(place, f"{turn}-{size}")
                start(size, folder, [name], threads)
                took[size].append(json.loads((folder / "times.json").read_text())[name]["shared"])
                print(f"turn {turn + 1}: scoring and repairing by {size} took "
                      f"{took[size][-1]:.1f} s; different files {differences(base, folder)}",
                      flush=True)
                if differences(base, folder):
                    return 1
    ratio = min(took[2]) / min(took[1])
    print(f"two processes take {ratio:.2f} of the time of one (bar {BAR}: "
          f"{'met' if ratio <= BAR else 'MISSED'}), with equal bytes")
    return int(ratio > BAR)


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


MODEL, OPTIONS = CASES["llama, curvature and measured"]
OPTIONS = {**OPTIONS, "recovery": "full(lr=1e-3, epochs=6)"}


def kills(times: int) -> None:
    """Kill, stop, slow down and fill disks."""
    from spacompiler.store import work

    killed(times)
    several(times)
    ended_by("killed while it calibrates", lambda rank: sent(signal.SIGKILL), "scoring")
    ended_by("killed while it repairs", lambda rank: sent(signal.SIGKILL), "repairing")
    ended_by("killed while it trains", lambda rank: sent(signal.SIGKILL), "recovering")
    ended_by("stopped", lambda rank: sent(signal.SIGSTOP), "scoring")
    ended_by("slow by 20 s", lambda rank: time.sleep(20), "scoring")

    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    ended_by("without room", lambda rank: setattr(work, "save_file", full), "scoring", 0)


def sent(number: signal.Signals) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def compiled(place: Path, name: str, data: str, *, rank: int = 0, size: int = 1, port: int = 0,
             work: Path | None = None, meanwhile: Callable[[str], None] = str) -> None:
    """Compile as one of so many processes."""
    import spacompiler

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), SPACOMPILER_SILENCE="8")
    seen = meanwhile if size > 1 and rank else None
    if seen is not None:  # helping processes tell of no stages
        from spacompiler.pipeline import run

        plain = run.Walk.__call__

        def told(self: Any, stage: str, *given: Any, **named: Any) -> Any:
            seen(stage)
            return plain(self, stage, *given, **named)

        run.Walk.__call__ = told  # type: ignore[method-assign]
    spacompiler.compile(MODEL, **{**PLAIN, **OPTIONS}, out=place / name, work=work,
                        calibration=data, recover_data=data, quiet=True, processes="together",
                        progress=lambda stage, done, total: meanwhile(stage))


def killed(times: int) -> None:
    """Kill a compile again and again, let it finish, and compare with one that nobody killed."""
    with tempfile.TemporaryDirectory() as folder:
        place, draw = Path(folder), random.Random(0)
        data = _batches(place, MODEL)
        whole = finished(lambda: compiled(place, "plain", data))
        kept = []
        for i in range(times):
            child = forked(lambda: compiled(place, "out", data, work=place / "work"))
            time.sleep(whole * (i + draw.random()) / times)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kept.append(len(list((place / "work").rglob("*.safetensors"))))
            if (place / "out").exists():
                break
        if not (place / "out").exists():
            finished(lambda: compiled(place, "out", data, work=place / "work"))
        print(f"killed {len(kept)} times within {whole:.1f} s each (entries kept: {kept}): "
              f"different files {differences(place / 'plain', place / 'out')}", flush=True)


def finished(work: Callable[[], object]) -> float:
    """Do something in a fork of this process, and return the seconds that it took."""
    began = time.perf_counter()
    os.waitpid(forked(work), 0)
    return time.perf_counter() - began


def several(times: int) -> None:
    """The same with one to three processes, another number each time, one of which is killed."""
    with tempfile.TemporaryDirectory() as folder:
        place, draw = Path(folder), random.Random(1)
        data = _batches(place, MODEL)
        whole, found = finished(lambda: compiled(place, "plain", data)), []
        for i in range(times + 1):
            size = draw.randint(1, 3) if i < times else 2
            children = [forked(partial(
                compiled, place, "out", data, rank=rank, size=size, port=port,
                work=place / "work")) for port in [free()] for rank in range(size)]
            if i < times:
                time.sleep(2 * whole * (i + draw.random()) / times)
                os.kill(draw.choice(children), signal.SIGKILL)
            found.append("".join(str(min(1, os.waitpid(child, 0)[1])) for child in children))
            if (place / "out").exists():
                break
        left = sorted(p.name for p in place.iterdir())
        print(f"processes that ended badly, each time: {found}; there is {left}; "
              f"different files {differences(place / 'plain', place / 'out')}", flush=True)


def free() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ended_by(how: str, happens: Callable[[int], object], stage: str, rank: int = 1) -> None:
    """Let something happen to one of two processes in a stage, and say how both ended."""
    with tempfile.TemporaryDirectory() as folder:
        place, port = Path(folder), free()
        data = _batches(place, MODEL)

        def meanwhile(now: str) -> None:
            if now == stage and not (place / "at").exists():
                (place / "at").write_text(str(time.time()))
                happens(rank)

        children = [forked(lambda r=each: compiled(
            place, "out", data, rank=r, size=2, port=port, work=place / "work",
            meanwhile=meanwhile if r == rank else str)) for each in (0, 1)]
        _, code = os.waitpid(children[1 - rank], 0)
        took = time.time() - float((place / "at").read_text())
        if code:
            os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
        left = {p.name for p in place.iterdir()} - {"at", Path(data).name}
        print(f"one of two {how}: the other ended with {os.waitstatus_to_exitcode(code)} after "
              f"{took:.1f} s; left: {sorted(left)}", flush=True)


def _tell(place: Path, sizes: list[int], names: list[str]) -> None:
    base = place / str(sizes[0])
    times = {n: json.loads((place / str(n) / "times.json").read_text()) for n in sizes}
    cpu = {n: sum(float(p.read_text()) for p in (place / str(n)).glob("cpu-*")) for n in sizes}
    for name in names:
        apart = {n: [d for d in differences(base, place / str(n)) if d.startswith(_file(name))]
                 for n in sizes[1:]}
        same = "equal bytes" if not any(apart.values()) else f"DIFFERENT {apart}"
        print(f"{name:36} {same}; what is shared took " + ", ".join(
            f"{times[n][name]['shared']:.2f} s by {n}" for n in sizes))
    print("CPU seconds, all processes: " + ", ".join(f"{cpu[n]:.1f} by {n}" for n in sizes))


if __name__ == "__main__":
    main()
