"""Other tools on the same models: how long, how much memory, and does the result run.

    python benchmarks/peers.py --out docs/peer-same-work.md
    python benchmarks/coverage.py torchvision --peer torch-pruning --out FILE.md

Same work on both sides: each has a process of its own per model, the same module and inputs, half
of each width by magnitude, no proof. Finding groups counts from the module to the groups, tracing
with it; the whole job from the module to a smaller one. The other tool is told how many heads
there are, where it has to be, and which layer gives the classes. Both results are executed after
the clock has stopped; one that does not run counts as none. Ours has several ways to make the
smaller network, and takes the first whose result runs: what those before it took counts, their
failing runs with it. CPU seconds of the process count, the median of three times for finding; no
garbage is collected meanwhile. Each tool has pruned one small network before, so that neither pays
for what it only does once in a process. Whether the other tool's result computes what the masked
dense model does is not checked here: only that it runs and is smaller.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from peer_models import MODELS, heads, mended, output
from torch import nn

from spacompiler.groups.solution import solve
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.plan import legal as allocation
from spacompiler.plan.plan import make_plan
from spacompiler.request.recipe import ROLES, Recipe
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.records import Decided, Request, Subject, Traced
from spacompiler.torch_backend.backend import emitters
from spacompiler.torch_backend.read.export import trace

SHARE = 0.5
REPEATS = 3
T = TypeVar("T")


@dataclass
class Timing:
    """One tool on one model: CPU seconds to find groups, and in all; peak memory above import.

    `room` is that peak against the model's own size plus one forward pass.
    """

    model: str
    find_s: float = 0.0
    total_s: float = 0.0
    room: float = 0.0
    result: str = ""


def _small() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A network that both tools handle, with its input."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), \
        nn.Flatten(), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval(), (torch.zeros(2, 3, 9, 9),)


def _found(timing: Timing, find: Callable[[], T]) -> T:
    """Find groups a few times, note the median CPU seconds of this thread, return the last.

    Garbage that loading and running the model left is collected before, and none meanwhile.
    """
    seconds = []
    for _ in range(REPEATS):
        gc.collect()
        gc.disable()
        start = time.thread_time()
        found = find()
        seconds.append(time.thread_time() - start)
        gc.enable()
    timing.find_s = statistics.median(seconds)
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _timed(model: str, suite: str, run: Callable[[Timing, nn.Module, object], str]) -> Timing:
    torch.set_num_threads(1)
    timing, base = Timing(model), _peak()
    models = importlib.import_module(suite)
    module, inputs = getattr(models, "NATURAL", models.MODELS)[model]()
    module.eval()
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    with torch.no_grad():
        module(*args, **kwargs)
    forward = _peak()
    try:
        timing.result = run(timing, module, inputs)
    except Exception as problem:  # failures are results
        text = (str(problem).strip().splitlines() or [""])[0]
        timing.result = f"{type(problem).__name__}: {text}"[:120]
    timing.room = (_peak() - base) / max(forward - base, 1.0)
    return timing


def _call(module: nn.Module, inputs: object) -> None:
    args, kwargs = _given(inputs)
    with torch.no_grad():
        module(*args, **kwargs)


def _smaller(ask: Request, subject: Subject, traced: Traced) -> Iterator[nn.Module]:
    """Score, plan and slice, by one way of slicing after the other."""
    scored = score(ask, subject, traced)
    plan = make_plan(traced.candidates, scored.scores, {
        g.name: max(1, int(g.size * SHARE)) for g in traced.candidates})
    decided = Decided(traced.trace, traced.solution, plan, plan.choices(traced.solution), False)
    for layout, _, make in emitters(subject, decided):
        if layout == "any":  # the others are those that a configuration says
            yield make(subject, decided).model


def _runs(module: nn.Module, inputs: object) -> bool:
    """Whether a module takes its inputs."""
    try:
        _call(module, inputs)
    except Exception:  # any code may run here
        return False
    return True


def _given(inputs: object) -> tuple[tuple[object, ...], dict[str, object]]:
    return (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)  # type: ignore[return-value]


def _find(module: nn.Module, inputs: object) -> Traced:
    program = trace(module, inputs, quick=True)
    return Traced(program, solve(program.graph, TABLE))


def _pruned(module: nn.Module, inputs: object, model: str) -> tuple[nn.Module, float]:
    """The first smaller network that runs, and the CPU seconds until it was made."""
    start = time.process_time()
    recipe = Recipe("params=50%", importance="magnitude", allocation="uniform", align=1,
                    layout="any", prove=False, onnx=False, latency=False, roles=ROLES,
                    approximate=True)
    ask, subject = make_request(module, inputs, recipe, Given(calibration="none", name=model))
    traced = _find(module, inputs)
    candidates = tuple(allocation.candidates(traced.solution, roles=ROLES, approximate=True))
    for made in _smaller(ask, subject, replace(traced, candidates=candidates)):
        spent = time.process_time() - start
        if _runs(made, inputs):
            return made, spent
    raise AssertionError("no way leads to a network that runs")


def ours(suite: str, model: str) -> Timing:
    """Trace, solve, score, plan and slice; no proof."""
    def run(timing: Timing, module: nn.Module, inputs: object) -> str:
        _pruned(*_small(), "small")
        _found(timing, lambda: _find(module, inputs))
        made, timing.total_s = _pruned(module, inputs, model)
        return _judged(made, module)
    return _timed(model, suite, run)


def _judged(made: nn.Module, dense: nn.Module | int) -> str:
    before, after = (n if isinstance(n, int) else sum(p.numel() for p in n.parameters())
                     for n in (dense, made))
    return "ok" if after < before else "left whole, silently"


def torch_pruning(suite: str, model: str) -> Timing:
    """Torch-Pruning, told what it has to be: half of every width by magnitude."""
    def pruned(module: nn.Module, inputs: object) -> float:
        import torch_pruning as tp

        told = heads(module)
        start = time.process_time()
        pruner = tp.pruner.MagnitudePruner(
            module, inputs, importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=SHARE, ignored_layers=output(module), num_heads=told,
            prune_num_heads=bool(told), prune_head_dims=not told, head_pruning_ratio=SHARE)
        pruner.step()
        return time.process_time() - start

    def run(timing: Timing, module: nn.Module, inputs: object) -> str:
        import torch_pruning as tp

        pruned(*_small())
        _found(timing, lambda: tp.DependencyGraph().build_dependency(
            module, example_inputs=inputs))
        before = sum(p.numel() for p in module.parameters())
        timing.total_s = pruned(module, inputs)
        mended(module)
        _call(module, inputs)
        return _judged(module, before)
    return _timed(model, suite, run)


PEERS: dict[str, Callable[[str, str], Timing]] = {"torch-pruning": torch_pruning}


def summary(peer: str, pairs: list[tuple[Timing, Timing]]) -> str:
    """Medians over the models that both handle, and what became of the others."""
    both = [(a, b) for a, b in pairs if a.result == b.result == "ok"]
    lines = [f"- ours: {Counter(a.result == 'ok' for a, _ in pairs)[True]} of {len(pairs)}; "
             f"{peer}: {Counter(b.result == 'ok' for _, b in pairs)[True]} of {len(pairs)}"]
    if both:
        find = [a.find_s / max(b.find_s, 1e-9) for a, b in both]
        total = [a.total_s / max(b.total_s, 1e-9) for a, b in both]
        lines += [f"- finding groups, ours / theirs: median {statistics.median(find):.3f}, "
                  f"worst {max(find):.3f}, best {min(find):.3f}",
                  f"- whole compile, ours / theirs: median {statistics.median(total):.2f}, "
                  f"worst {max(total):.2f}, best {min(total):.3f}",
                  f"- peak memory / (model + one forward), ours: "
                  f"median {statistics.median(a.room for a, _ in both):.2f}, "
                  f"worst {max(a.room for a, _ in both):.2f}"]
    return "\n".join(lines)


def _one(tool: str, model: str) -> Timing:
    """Let a process of its own time one tool on one model."""
    done = subprocess.run([sys.executable, __file__, "--one", tool, model], capture_output=True,
                          text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return Timing(**json.loads(lines[-1])) if lines else \
        Timing(model, result=(done.stderr.strip().splitlines() or ["nothing"])[-1][:120])


def main() -> int:
    """Compare on the models of `peer_models`, or time one tool on one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=PEERS, default="torch-pruning")
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"))
    parser.add_argument("--json", type=Path, help="a file that keeps results")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.one:
        tool, model = asked.one
        print(json.dumps(asdict({"ours": ours, **PEERS}[tool]("peer_models", model))))
        return 0
    known = json.loads(asked.json.read_text()) if asked.json and asked.json.exists() else {}
    pairs = []
    for model in asked.only:
        known[model] = known.get(model) or [asdict(_one(t, model)) for t in ("ours", asked.peer)]
        pairs.append((Timing(**known[model][0]), Timing(**known[model][1])))
        print(*pairs[-1], sep="\n", flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(known, indent=1))
    rows = [f"| {a.model} | {a.find_s:.3f} | {b.find_s:.3f} | {a.total_s:.2f} | {b.total_s:.2f} "
            f"| {a.result} | {b.result} |" for a, b in pairs]
    text = "\n".join([
        f"# The same work beside {asked.peer}", "",
        f"Made by `python benchmarks/peers.py` with {asked.peer} "
        f"{version(asked.peer)}, torch {torch.__version__}, one thread. What counts, and what the "
        "other tool is told, stands at the top of that file. CPU seconds.", "",
        summary(asked.peer, pairs), "",
        "| model | find groups | theirs | whole job | theirs | result | theirs |",
        "|---|---|---|---|---|---|---|", *rows, ""])
    print(text)
    if asked.out:
        asked.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
