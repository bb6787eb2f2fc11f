"""Other tools on the same models: how long, how much memory, and does the result run.

    python benchmarks/coverage.py torchvision --peer torch-pruning --out docs/peer-torchvision.md

Both sides get a process of their own per model, the same module and inputs (torchvision's
classifiers at their usual image size), half of each width,
magnitude scores and no proof; CPU seconds of that process count, for finding groups the median
of three times. Each tool has handled one small network before, so that neither pays for what it
only does once in a process. Whether the other tool's result computes what the masked dense model
does is not checked here: only that it runs and is smaller.
"""

from __future__ import annotations

import copy
import gc
import importlib
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from spacompiler.groups.solution import solve
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import score
from spacompiler.plan import legal as allocation
from spacompiler.plan.plan import make_plan
from spacompiler.request.recipe import ROLES, Recipe
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.records import Traced
from spacompiler.torch_backend.emit.module import operate
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


def ours(suite: str, model: str) -> Timing:
    """Trace, solve, score, plan and slice; no proof."""
    def run(timing: Timing, module: nn.Module, inputs: object) -> str:
        small, example = _small()
        solve(trace(small, example, quick=True).graph, TABLE)
        start = time.process_time()
        recipe = Recipe("params=50%", importance="magnitude", allocation="uniform", align=1,
                        layout="any", prove=False, onnx=False, latency=False, roles=ROLES,
                        approximate=True)
        ask, subject = make_request(module, inputs, recipe,
                                    Given(calibration="none", name=model))
        program = trace(module, inputs, quick=True)
        traced = time.process_time()
        graphs = [program.graph, *(copy.deepcopy(program.graph) for _ in range(REPEATS - 1))]
        solution = _found(timing, lambda: solve(graphs.pop(), TABLE))
        repeats = time.process_time() - traced - timing.find_s
        candidates = tuple(allocation.candidates(solution, roles=ROLES, approximate=True))
        scored = score(ask, subject, Traced(program, solution, candidates))
        plan = make_plan(candidates, scored.scores, {
            g.name: max(1, int(g.size * SHARE)) for g in candidates})
        operate(program, module, solution, plan.choices(solution))
        timing.total_s = time.process_time() - start - repeats
        return "ok"
    return _timed(model, suite, run)


def torch_pruning(suite: str, model: str) -> Timing:
    """Torch-Pruning without hints: half of every width by magnitude."""
    def run(timing: Timing, module: nn.Module, inputs: object) -> str:
        import torch_pruning as tp

        small, example = _small()
        tp.DependencyGraph().build_dependency(small, example_inputs=example)
        _found(timing, lambda: tp.DependencyGraph().build_dependency(
            module, example_inputs=inputs))
        before = sum(p.numel() for p in module.parameters())
        start = time.process_time()
        pruner = tp.pruner.MagnitudePruner(
            module, inputs, importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=SHARE)
        pruner.step()
        timing.total_s = time.process_time() - start
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
        with torch.no_grad():
            module(*args, **kwargs)  # type: ignore[misc]
        after = sum(p.numel() for p in module.parameters())
        return "ok" if after < before else "left whole, silently"
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
                  f"worst {max(find):.3f}, above 0.1 for {sum(f > 0.1 for f in find)} of "
                  f"{len(find)}",
                  f"- whole compile, ours / theirs: median {statistics.median(total):.2f}, "
                  f"worst {max(total):.2f}, best {min(total):.3f}",
                  f"- peak memory / (model + one forward), ours: "
                  f"median {statistics.median(a.room for a, _ in both):.2f}, "
                  f"worst {max(a.room for a, _ in both):.2f}"]
    return "\n".join(lines)
