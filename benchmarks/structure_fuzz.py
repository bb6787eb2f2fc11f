"""Valid inputs changed in one place: each must end in a result or in one clear error.

    nice python benchmarks/structure_fuzz.py --seconds 3600
    python benchmarks/structure_fuzz.py --one 1234       # again what mutant 1234 did

Artifacts of every kind, checkpoints, adapters, ONNX files and recipes are changed by
`structure_mutants` and read by inspect, verify, load, lift and compile in a forked child, with
bounded time (of the processor) and memory. Faults are: an exception that is no SpaError, a hang, a
crash, an import of foreign code, a connection, another process, a file read or written outside, an
output that is half-made. Fails unless half of all mutants get past the first check (hashes, JSON,
safetensors, protobuf, form) and there is no fault.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_fuzz
import structure_mutants as mutants
import torch
import transformers
from structure_mutants import TRAP, Random
from torch import nn

import spacompiler
from spacompiler.adapters.lifting import lift
from spacompiler.errors import SpaError, UsageError
from spacompiler.store import folder as artifact

QUICK: dict[str, Any] = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False,
                         "repair": "none"}
SECONDS, WALL, MEMORY, CHUNK = 40, 900, 4 * 2**30, 40
FIRST = re.compile(r"cannot be read|is damaged|no valid ONNX|is no artifact|cannot be parsed|"
                   r"holds no|no safetensors|hashes")
"""What the first check of a reader says."""
BAD_EVENTS = ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen", "os.exec",
              "os.posix_spawn", "os.spawn")


class Net(nn.Module):
    """A network of the user's own: its code is not recorded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 4)."""
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Subject(NamedTuple):
    """What is changed: a folder under `sound`, how it is finished, and what reads it."""

    folder: str
    readers: tuple[Callable[[Path, Path], Any], ...]
    sealed: bool = False
    weight: float = 1


def sound(root: Path) -> None:
    """Write one valid input of each kind."""
    torch.manual_seed(0)
    net, inputs = Net(), (torch.randn(4, 8),)
    spacompiler.compile(net, inputs, target="params=60%", out=root / "any", **QUICK)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2))
    model.save_pretrained(root / "checkpoint")
    model.save_pretrained(root / "sharded", max_shard_size=4000)
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).save_pretrained(
        root / "adapter")
    for name, options in (("uniform", {}), ("stock-any", {"layout": "any"}),
                          ("kept", {"adapter": root / "adapter", "keep_adapter": True})):
        spacompiler.compile(str(root / "checkpoint"), target="body=70%", out=root / name,
                            **{**QUICK, **options})
    spacompiler.compile("zoo:fused-qkv", target="body=70%", out=root / "program", **QUICK)
    for name in ("file", "outside"):
        (root / name).mkdir()
    for i, made in enumerate(onnx_fuzz.seeds()):
        onnx.save(made, root / "file" / f"{i}.onnx")
    onnx.save_model(onnx_fuzz.seeds()[0], root / "outside/0.onnx", save_as_external_data=True,
                    location="0.data", size_threshold=0)
    spacompiler.compile(str(root / "file/0.onnx"), target="params=70%", out=root / "onnx", **QUICK)
    recipe = root / "recipe"
    recipe.mkdir()
    (recipe / "recipe.json").write_text(json.dumps({
        "target": "params=60%", "importance": {"magnitude": {"norm": 2}}, "allocation": "uniform",
        "repair": "none", "roles": ["channel", "head"], "only": ["*"], "ignore": ["a.bias"],
        "align": 1, "floor": 0.1, "layout": "any", "calibration": "none", "samples": 16,
        "length": 128, "batch": 2, "seed": 0, "prove": True, "onnx": False, "latency": False}))
    (root / "plan").mkdir()
    shutil.copy(root / "any/plan.json", root / "plan/plan.json")


# --- readers --------------------------------------------------------------------------------------


def _verify(source: Callable[[Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, root: spacompiler.verify(folder, source(root))


def _load(source: Callable[[Path], Any]) -> Callable[[Path, Path], Any]:
    return lambda folder, root: spacompiler.load(folder, source(root))


def _compile(*, of: str = "", **options: Any) -> Callable[[Path, Path], Any]:
    """Compile the folder itself, or the sound one `of` with the folder as its adapter."""
    def reader(folder: Path, root: Path) -> Any:
        more = {"adapter": folder} if of else {}
        return spacompiler.compile(str(root / of if of else folder), target="body=70%",
                                   out=folder.parent / "out", **{**QUICK, **more, **options})
    return reader


def _file(folder: Path, root: Path) -> Any:
    """Compile every file that was changed."""
    files = sorted(folder.glob("*.onnx"))
    changed = [p for p in files
               if p.read_bytes() != (root / folder.name / p.name).read_bytes()]
    for place in changed or files[:1]:
        spacompiler.compile(str(place), target="params=70%", out=folder.parent / "out", **QUICK)


def _recipe(folder: Path, root: Path) -> Any:
    """Compile by a recipe's file (JSON is YAML), which may name no code."""
    spacompiler.compile(Net(), (torch.ones(4, 8),), recipe=folder / "recipe.json", dry_run=True)


def _plan(folder: Path, root: Path) -> Any:
    from spacompiler.plan.plan import Plan

    Plan.read(folder).choices(SOLUTION[0])


SOLUTION: list[Any] = []


def _nothing(root: Path) -> None:
    return None


def _net(root: Path) -> nn.Module:
    return Net()


def _dense_file(root: Path) -> str:
    return str(root / "file/0.onnx")


def _dense_folder(root: Path) -> str:
    return str(root / "checkpoint")


def _lift(folder: Path, root: Path) -> Any:
    return lift(folder / "adapter", folder, folder.parent / "out")


def _inspect(folder: Path, root: Path) -> Any:
    return spacompiler.inspect(str(folder))


SUBJECTS = (
    Subject("any", (_verify(_net), _load(_net), _verify(_nothing)), True, 6),
    Subject("uniform", (_verify(_nothing), _load(_nothing), _verify(_dense_folder)), True, 2),
    Subject("stock-any", (_verify(_nothing), _load(_nothing), _verify(_dense_folder)), True, 2),
    Subject("program", (_verify(_nothing), _load(_nothing)), True, 0.2),
    Subject("kept", (_lift, _lift, _verify(_nothing)), True, 4),
    Subject("onnx", (_verify(_dense_file), _load(_nothing)), True, 6),
    Subject("file", (_file,), weight=3),
    Subject("outside", (_file,)),
    Subject("checkpoint", (_inspect,)),
    Subject("checkpoint", (_compile(prove=False),), weight=0.3),
    Subject("sharded", (_inspect,)),
    Subject("adapter", (_compile(of="checkpoint", prove=False),), weight=0.5),
    Subject("recipe", (_recipe,)),
    Subject("plan", (_plan,)),
)
UNREAD = ("MANIFEST.json", "report.json", "generation_config.json", "README.md")
"""What no reader of an artifact looks into, but for hashes."""


# --- one mutant -----------------------------------------------------------------------------------


def attempt(number: int, seed: int, root: Path, spot: Path) -> tuple[str, str]:
    """Make a mutant and read it. Returns (what was changed, how it ended)."""
    rng = Random(f"{seed}/{number}")
    subject = rng.choices(SUBJECTS, [s.weight for s in SUBJECTS])[0]
    shutil.rmtree(spot, ignore_errors=True)
    spot.mkdir()
    shutil.copyfile(root / "outside.safetensors", spot / "outside.safetensors")
    folder = Path(shutil.copytree(root / subject.folder, spot / subject.folder))
    what = mutants.change(folder, rng, UNREAD if subject.sealed else ())
    if subject.sealed:
        artifact.write_manifest(folder)
    before = {p.name for p in spot.iterdir()}
    reader = rng.choice(subject.readers)
    EVENTS.clear()
    ended = _ended(reader, folder, root)
    extra = {p.name for p in spot.iterdir()} - before - {"out"}
    if extra:
        ended = f"FAULT left {sorted(extra)}"
    elif (spot / "out").exists() and subject.folder != "kept":
        wrong = artifact.check_manifest(spot / "out")
        ended = f"FAULT half-made: {wrong}" if wrong or ended.startswith("refused") else ended
    if EVENTS or TRAP in sys.modules:
        ended = f"FAULT {EVENTS[:2] or 'foreign code ran'}"
    return f"{subject.folder}/{what}", ended


def _ended(reader: Callable[[Path, Path], Any], folder: Path, root: Path) -> str:
    try:
        found = reader(folder, root)
    except SpaError as problem:
        early = FIRST.search(problem.what) or isinstance(problem, UsageError)
        raw = re.match(r"[A-Z]\w+(Error|Exception)\b", problem.why)
        return ("refused at once: " if early else "refused: ") + _short(problem.what) + (
            f" <{raw[0]}>" if raw else "")
    except Exception as problem:
        return "FAULT " + " | ".join(
            line.strip() for line in traceback.format_exception(problem)[-3:])
    if not isinstance(found, list):
        return "done"
    bad = [c for c in found if c.passed is False]
    if not bad:
        return "ok" if all(c.passed for c in found) else "ok but for what was skipped"
    early = bad[0].name == "hashes" or FIRST.search(bad[0].detail)
    raw = re.match(r"[A-Z]\w+(Error|Exception)\b", bad[0].detail)
    return ("refused at once: " if early else "failed: ") + bad[0].name + (
        f" <{raw[0]}>" if raw else "")


def _short(text: str) -> str:
    return re.sub(r"'.*?'|\"[^\"]*\"|[\d.,]+%?|\S*/\S*", "…", text.split("\n")[0])[:60]


EVENTS: list[str] = []


def watch(root: Path) -> None:
    """Note connections, other processes, imports of the trap, reads of what lies outside."""
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in BAD_EVENTS or (event == "import" and str(args[0]).startswith(TRAP)):
            EVENTS.append(f"{event} {args}"[:200])
        elif event == "open" and str(args[0]).endswith(("/outside.safetensors", "/etc/passwd",
                                                         f"{TRAP}.py")):
            EVENTS.append(f"read {args[0]}")

    sys.addaudithook(hook)


def warm(root: Path, spot: Path) -> None:
    """Read what is sound with every reader: it passes, and children find modules imported."""
    for subject in SUBJECTS:
        for reader in subject.readers:
            shutil.rmtree(spot, ignore_errors=True)
            spot.mkdir()
            folder = Path(shutil.copytree(root / subject.folder, spot / subject.folder))
            ended = _ended(reader, folder, root)
            if ended not in ("done", "ok", "ok but for what was skipped"):
                raise SystemExit(f"{subject.folder} is not sound: {ended}")


# --- children -------------------------------------------------------------------------------------


def worker(first: int, seed: int, root: Path, spot: Path, pipe: int) -> None:
    """Go through a chunk of mutants; what each did goes down the pipe, one line each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # ONNX Runtime reports each refusal by itself
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    watch(root)
    for number in range(first, first + CHUNK):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        found = attempt(number, seed, root, spot)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(pipe, json.dumps([number, *found]).encode() + b"\n")


def lines(first: int, seed: int, root: Path, spot: Path) -> Iterator[tuple[int, str, str]]:
    """Run one child, and yield what it says; a mutant that ends or outlasts it is a fault."""
    get, put = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(get)
        try:
            worker(first, seed, root, spot, put)
        finally:
            os._exit(0)
    os.close(put)
    buffer, expected = b"", first
    while select.select([get], [], [], WALL)[0] and (part := os.read(get, 1 << 16)):
        *whole, buffer = (buffer + part).split(b"\n")
        for line in whole:
            number, what, ended = json.loads(line)
            expected = number + 1
            yield number, what, ended
    os.close(get)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if expected < first + CHUNK:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else status
        yield expected, "?", f"FAULT the child ended: {name}"


def report(found: Counter[str], kinds: Counter[str], seconds: float) -> bool:
    """Print counts; return whether all is well."""
    total = sum(found.values())
    early = sum(n for k, n in found.items() if k.startswith("refused at once"))
    faults = sum(n for k, n in found.items() if k.startswith("FAULT"))
    for what, n in found.most_common():
        print(f"{n:7} {what}")
    print(f"{total} mutants in {seconds:.0f} s; past the first check: {total - early} "
          f"({(total - early) / max(total, 1):.0%}); faults: {faults} of {len(kinds)} kinds",
          flush=True)
    for what, n in kinds.most_common():
        print(f"{n:7} {what}")
    return not faults and 2 * early <= total


def main() -> None:
    """Go through mutants until the time is over."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", type=int, default=None, help="number of one mutant, run here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="mutants-"))
    root, here = base / "sound", base / "here"
    root.mkdir(), here.mkdir()
    sound(root)
    shutil.copy(root / "checkpoint/model.safetensors", root / "outside.safetensors")
    (here / f"{TRAP}.py").write_text("raise SystemExit('foreign code ran')\n")
    SOLUTION.append(spacompiler.inspect(Net(), (torch.ones(4, 8),)))
    os.chdir(here)
    sys.path.insert(0, str(here))  # worse than any shell makes it
    warm(root, base / "spot")
    if asked.one is not None:
        print(base, *attempt(asked.one, asked.seed, root, base / "spot"), sep="\n")
        return
    found, kinds, began, number = Counter[str](), Counter[str](), time.monotonic(), 0
    while time.monotonic() < began + asked.seconds:
        done = 0
        for at, what, ended in lines(number, asked.seed, root, base / "spot"):
            done = at + 1 - number
            if ended.startswith("FAULT"):
                print(at, what, ended, flush=True)
                kinds[re.sub(r"\d+|'[^']*'", "…", ended)[:160]] += 1
                ended = "FAULT"
            found[ended] += 1
        number += done
        if number % 2000 < done:
            report(found, kinds, time.monotonic() - began)
    well = report(found, kinds, time.monotonic() - began)
    shutil.rmtree(base)
    sys.exit(not well)


if __name__ == "__main__":
    main()
