"""What all rows of quality.py share: the model, traced once, and one pass over the calibration."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from language_models import MODELS, LanguageModel
from quality_rows import Method

from spacompiler.evidence.losses import default_loss, perplexity
from spacompiler.evidence.scores import Scores
from spacompiler.evidence.statistics import Covariance
from spacompiler.plan import legal as allocation
from spacompiler.request import registry
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.emit.biases import unbiased, with_biases
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.gather.sampling import continued

SUMS = ("count", "seen", "total", "upper")


@dataclass
class Bench:
    """The model, traced once; text; and what was gathered and measured so far."""

    model: LanguageModel
    module: Any
    inputs: Any
    tokenizer: Any
    calibration: torch.Tensor
    texts: dict[str, torch.Tensor]
    results: Path
    seed: int = 0
    text: Path | None = None  # what is calibrated on, as a file
    trace: Any = None
    solution: Any = None
    context: Any = None
    done: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    inputs_of: dict[bool, Any] = field(default_factory=dict)
    beside: list[Any] = field(default_factory=list)  # the model's own text

    @property
    def batches(self) -> list[Any]:
        return [((), {"input_ids": part}) for part in self.calibration.split(self.model.batch)]

    def analyse(self) -> None:
        """Trace; zero biases are put where some row's repair needs one, the same for all rows."""
        self.trace, self.solution = TORCH.trace(self.module, self.inputs)
        paths = unbiased(self.module, self.solution, self.candidates(Method("random", only=())))
        self.module = with_biases(self.module, paths, owned=True)
        self.trace, self.solution = TORCH.trace(self.module, self.inputs)
        self.stored = dict(self.trace.program.state_dict)
        self.context = fresh_context(self.trace, self.solution, self.seed)

    def candidates(self, method: Method) -> list[Any]:
        return allocation.candidates(self.solution, roles=("channel", "head"), only=method.only)

    def restore(self) -> None:
        """Give the traced program its dense arrays back."""
        self.trace.program.state_dict.update(self.stored)
        self.trace.repaired.clear()

    def perplexities(self, module: Any) -> dict[str, float]:
        """Return the perplexity of each text."""
        return {name: perplexity(module, ids, batch=self.model.batch)
                for name, ids in self.texts.items()}

    def save(self) -> None:
        self.results.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")


def gather(bench: Bench, methods: Mapping[str, Method]) -> None:
    """Score every group by every method, from one pass, or read what an earlier run gathered."""
    place = bench.results.with_suffix(".pt")
    held = torch.load(place, weights_only=True) if place.exists() else {"scores": {}, "inputs": {}}
    if held.setdefault("model", MODELS["smollm2"].title) != bench.model.title and held["scores"]:
        raise SystemExit(f"{place} was gathered of {held['model']}; give another --json")
    held["model"] = bench.model.title
    methods = {name: method for name, method in methods.items() if method.importance}
    missing = {n: m for n, m in methods.items() if n not in held["scores"]}
    groups = bench.candidates(Method("random", only=()))
    if missing:
        passes = {n: registry.find("importance", m.importance) for n, m in missing.items()}
        needs = {s for p in passes.values() for s in p.needs}
        needs = needs - {"covariance"} if held["inputs"] else needs | {"covariance"}
        if held.get("curvature"):
            needs -= {"curvature"}
        start = time.perf_counter()
        with peak() as memory:
            bench.context.calibrate(needs, bench.batches if needs else [], default_loss,
                                    groups=groups, tick=lambda: print(
                                        ".", end="", file=sys.stderr, flush=True))
        bench.done.setdefault("calibration", []).append(
            {"statistics": sorted(needs), "seconds": round(time.perf_counter() - start),
             "memory_mb": memory[0], "rows": list(missing)})
        if held["inputs"]:
            give(bench.context, held["inputs"])
        held["inputs"] = _taken(bench.context)
        held["curvature"] = {**held.get("curvature", {}), **bench.context.gradients.curvature}
        if any(m.continued for m in missing.values()) and "own" not in held:
            held["own"] = _write_on(bench, groups)
    sums = _sums(held)
    if missing:
        every: dict[Any, dict[str, torch.Tensor]] = {}
        for name, importance in passes.items():
            wider = missing[name].continued
            give(bench.context, sums[wider]["inputs"])
            bench.context.gradients.curvature.update(
                sums[wider and getattr(importance, "continued", True)]["curvature"])
            own = every.setdefault((importance, wider), {})
            for group in bench.candidates(missing[name]):
                if group.name not in own:
                    own[group.name] = importance.score(group, bench.context).double()
            held["scores"][name] = dict(own)
            print(f"scored {name}", file=sys.stderr, flush=True)
        torch.save(held, place)
        bench.save()
    bench.inputs_of = {wider: each["inputs"] for wider, each in sums.items()}
    bench.beside = [((), {"input_ids": ids}) for ids in held.get("own", {}).get("text", ())]
    bench.scores = held["scores"]


def _write_on(bench: Bench, groups: list[Any]) -> dict[str, Any]:
    """Let the model continue the windows; return its text, and what is gathered over it."""
    start = time.perf_counter()
    text = continued(bench.module, bench.batches, bench.seed)
    wrote = time.perf_counter() - start
    context = fresh_context(bench.trace, bench.solution, bench.seed)
    context.calibrate({"covariance", "curvature"}, text, default_loss, groups=groups)
    bench.done["continued"] = {"seconds": round(time.perf_counter() - start),
                               "seconds_writing": round(wrote)}
    return {"text": [kwargs["input_ids"] for _, kwargs in text], "inputs": _taken(context),
            "curvature": dict(context.gradients.curvature)}


def _sums(held: Mapping[str, Any]) -> dict[bool, dict[str, Any]]:
    """Covariances and curvature of the calibration (False), and of it with the model's own text."""
    found = {False: {"inputs": held["inputs"], "curvature": held["curvature"]}}
    if "own" in held:
        own = held["own"]
        found[True] = {
            "inputs": {key: {k: v + own["inputs"][key][k] for k, v in sums.items()}
                       for key, sums in held["inputs"].items()},
            "curvature": {k: v + own["curvature"][k] for k, v in held["curvature"].items()}}
    return found


def _taken(context: Scores) -> dict[str, Any]:
    """Covariances as arrays and numbers: what a file holds is read again without code."""
    return {key: {name: getattr(s["covariance"], name) for name in SUMS}
            for key, s in context._inputs.items()}


def give(context: Scores, inputs: Mapping[str, Any]) -> None:
    for key, sums in inputs.items():
        context._inputs.setdefault(key, {})["covariance"] = Covariance(**sums)


@contextmanager
def peak() -> Iterator[list[int]]:
    """Yield a list that holds the peak of resident memory, in MB, once the block is left."""
    found = [0]
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield found
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            found[0] = int(line.split()[1]) // 1024


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function the first time only: what it measures of the dense model holds for all.

    With other arrays than the model's (the last argument) it is called each time.
    """
    found: list[Any] = []

    def call(*args: Any) -> Any:
        if len(args) > 3 and args[3]:
            return function(*args)
        if not found:
            found.append(function(*args))
        return found[0]

    return call
