"""Perplexity of one language model pruned without training, by every method on one protocol.

    python benchmarks/quality.py --data DIR --json quality.json --picture quality.png

DIR holds wikitext2/valid.txt (calibration), wikitext2/test.raw and ptb/valid.txt (evaluation);
without it, text that Python carries stands in for all three. All rows see the same calibration
windows; what their criteria need of them is gathered in one pass. Done cells are kept in the
JSON file, so that a run can be cut short and taken up again; `--only` names rows, `--also
file.py:Class` adds a row for a criterion of one's own.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spacompiler.evidence.calibration import python_text, windows
from spacompiler.evidence.losses import default_loss, perplexity
from spacompiler.evidence.prototypes import CHOICES, by_prototype
from spacompiler.evidence.scores import Scores
from spacompiler.evidence.statistics import Covariance
from spacompiler.passes.factors import Factors
from spacompiler.passes.gates import Gates
from spacompiler.pipeline import finish
from spacompiler.pipeline.decide import allocate_counts, decide
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import scheduling
from spacompiler.plan import legal as allocation
from spacompiler.request import registry
from spacompiler.request.recipe import Recipe
from spacompiler.sources import named as source
from spacompiler.stages.records import Scored, Traced
from spacompiler.torch_backend.backend import TORCH
from spacompiler.torch_backend.emit.biases import unbiased, with_biases
from spacompiler.torch_backend.gather.context import fresh_context
from spacompiler.torch_backend.gather.sampling import continued
from spacompiler.trials import measure as measurements

SHARES = ("80%", "65%", "50%")
LENGTH = 512
MLP = ("*.mlp.*",)
KV_GROUPS = "*.q_proj.weight:0.0"
SUMS = ("count", "seen", "total", "upper")


@dataclass(frozen=True)
class Method:
    """A row: passes by name, and which groups may go (all channels and heads, or `only`)."""

    importance: Any
    allocation: str = "uniform"
    repair: str = "none"
    only: tuple[str, ...] = MLP
    floor: float = 0.0
    needs: tuple[str, ...] = ()
    continued: bool = False
    schedule: Any = None  # learns gates, from the criterion's scores; `scales` after the repair


METHODS: dict[str, Method] = {
    "random": Method("random"),
    "magnitude": Method("magnitude"),
    "LLM-Pruner vector": Method("taylor-vector"),
    "LLM-Pruner element1": Method("taylor-element"),
    "LLM-Pruner mixed": Method("taylor-element(order='mixed')"),
    "Wanda-sp": Method("wanda"),
    "Global MP": Method("magnitude", "threshold", floor=0.02),
    "GBLM": Method("gblm"),
    "FLAP UL-UM": Method("fluctuation", repair="bias"),
    "FLAP AL-AM": Method("fluctuation(standardised=True)", "threshold", "bias",
                         only=(*MLP, KV_GROUPS)),
    "CFSP": Method("cfsp", "cfsp-layers"),
    "Adapt-Pruner": Method("taylor-element", "adapt-layers"),
    "OBS refit": Method("obs(bias=False)", repair="refit(bias=False, damping=0.01)"),
    "OBS, ridge chosen": Method("obs(bias=False)", repair="refit"),
    "ours, MLP only": Method("curvature", "global", "refit", floor=0.02),
    "ours, by layers": Method("curvature", "cfsp-layers", "refit", floor=0.02),
    "ours, not measured": Method("curvature", "global", "refit", (), 0.02),
    "ours, measured": Method("curvature", "measured", "refit", (), 0.02),
    "ours, searched": Method("curvature", "search(generations=4, offspring=8)", "refit", (), 0.02),
    "ours, in sequence": Method("curvature", "measured",
                                "refit(sequential=True, residual=True, every=True)", (), 0.02),
    "ours": Method("curvature", "measured",
                   "refit(sequential=True, residual=True, every=True)", (), 0.02,
                   continued=True),
    "ours, scored by given text": Method(
        "curvature(continued=False)", "measured",
        "refit(sequential=True, residual=True, every=True)", (), 0.02, continued=True),
    "gates, refit": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                           schedule=Gates(scales=0)),
    "gates": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                    schedule=Gates()),
    "gates, streams": Method("curvature", repair="refit(damping=0.1)", only=(), floor=0.02,
                             schedule=Gates(streams=True)),
    "gates, in sequence": Method("curvature", only=(), floor=0.02, schedule=Gates(streams=True),
                                 repair="refit(sequential=True, residual=True, every=True)"),
    "gates, nothing else": Method("curvature", only=(), floor=0.02,
                                  schedule=Gates(refit=0.0, scales=0)),
    "gates, factors": Method("curvature", only=(), floor=0.02, schedule=Gates(refit=0.0)),
    "gates, continued": Method("curvature", only=(), floor=0.02, schedule=Gates(), continued=True,
                               repair="refit(sequential=True, residual=True, every=True)"),
    "factors, continued": Method("curvature", "measured(batches=4, rounds=3)", "refit", (), 0.02,
                                 continued=True, schedule=Factors()),
    "factors, in sequence": Method(
        "curvature", "measured(batches=4, rounds=3)",
        "refit(sequential=True, residual=True, every=True)", (), 0.02, continued=True,
        schedule=Factors()),
    "OBS refit, continued": Method("obs(bias=False)",
                                   repair="refit(bias=False, damping=0.01)", continued=True),
}
GLOBAL = ("magnitude", "wanda", "taylor", "taylor-vector", "taylor-element")
METHODS |= {f"{how}, {by}": Method(by, how, only=(), floor=0.1)
            for by in GLOBAL for how in ("uniform", "global")}


@dataclass
class Bench:
    """The model, traced once; text; and what was gathered and measured so far."""

    module: Any
    inputs: Any
    tokenizer: Any
    calibration: torch.Tensor
    texts: dict[str, torch.Tensor]
    results: Path
    seed: int = 0
    trace: Any = None
    solution: Any = None
    context: Any = None
    done: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    inputs_of: dict[bool, Any] = field(default_factory=dict)
    beside: list[Any] = field(default_factory=list)  # the model's own text

    @property
    def batches(self) -> list[Any]:
        return [((), {"input_ids": part}) for part in self.calibration.split(2)]

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

    def save(self) -> None:
        self.results.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")


# --- one pass over the calibration windows for all rows ---------------------------------------


def gather(bench: Bench, methods: Mapping[str, Method]) -> None:
    """Score every group by every method, from one pass, or read what an earlier run gathered."""
    place = bench.results.with_suffix(".pt")
    held = torch.load(place, weights_only=True) if place.exists() else {"scores": {}, "inputs": {}}
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
            _give(bench.context, held["inputs"])
        held["inputs"] = _taken(bench.context)
        held["curvature"] = {**held.get("curvature", {}), **bench.context.gradients.curvature}
        if any(m.continued for m in missing.values()) and "own" not in held:
            held["own"] = _write_on(bench, groups)
    sums = _sums(held)
    if missing:
        every: dict[Any, dict[str, torch.Tensor]] = {}
        for name, importance in passes.items():
            wider = missing[name].continued
            _give(bench.context, sums[wider]["inputs"])
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


def _give(context: Scores, inputs: Mapping[str, Any]) -> None:
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


# --- rows -------------------------------------------------------------------------------------


def measure(bench: Bench, name: str, method: Method, share: str) -> dict[str, Any]:
    """Allocate, repair, slice and evaluate one cell of the table."""
    recipe = Recipe(f"body={share}", only=method.only, layout="any", prove=False, onnx=False,
                    latency=False, floor=method.floor, seed=bench.seed, align=8)
    bench.restore()
    start = time.process_time()
    key = f"{share} {method.importance} {method.allocation} {method.repair.partition('(')[0]} " \
        f"{method.only} {method.floor}" + " continued" * method.continued
    known = bench.done.setdefault("counts", {})
    with peak() as memory:
        ask, subject = make_request(bench.module, bench.inputs, recipe, Given(
            importance=method.importance, allocation=method.allocation, repair=method.repair,
            calibration=[kwargs for _, kwargs in bench.batches]))
        _give(bench.context, bench.inputs_of[method.continued])
        if method.continued:
            ask = replace(ask, calibration=replace(ask.calibration, beside=bench.beside))
        traced = Traced(bench.trace, bench.solution, tuple(bench.candidates(method)))
        scored = Scored(ask.importance, traced.candidates, {
            n: s.numpy() for n, s in bench.scores[name].items()}, context=bench.context)
        task = replace(scheduling(ask, subject, traced), context=bench.context,
                       scores=scored.scores)
        learns = method.schedule is not None and not getattr(method.schedule, "allocates", False)
        if learns:
            scored, before = learned(bench, method, share, task)
        elif key not in known:
            kept, stock = allocate_counts(ask, subject, traced, scored)
            known[key] = {"kept": kept, "stock": stock,
                          "seconds": time.process_time() - start}
        if not learns:
            before = known[key]["seconds"]
            scored = replace(scored, counts=known[key]["kept"],
                             stock=known[key].get("stock", ""))
        start = time.process_time()
        decided = decide(ask, subject, replace(traced, candidates=scored.candidates), scored)
        if ask.compensation is not None:
            decided = finish.repair(ask, subject, scored, decided)
        if method.schedule is not None:
            method.schedule.after(replace(task, candidates=scored.candidates), decided.choices)
        emitted = finish.emit(ask, subject, decided)
    spent = time.process_time() - start + before
    costs = decided.plan.costs
    found = {"parameters": costs["params"]["pruned"],
             "body": costs["body"]["pruned"] / costs["body"]["dense"],
             "cpu_seconds": round(spent, 1), "memory_mb": memory[0],
             **{text: perplexity(emitted.model, ids, batch=2) for text, ids in bench.texts.items()}}
    bench.restore()
    return found


def learned(bench: Bench, method: Method, share: str, task: Any) -> tuple[Scored, float]:
    """Return what gates learned, and the CPU seconds of it: once for all rows of equal gates."""
    place = bench.results.with_suffix(".gates.pt")
    held = torch.load(place, weights_only=True) if place.exists() else {}
    gates = replace(method.schedule, scales=0, streams=False)
    key = f"{share} {gates}" + " continued" * method.continued
    if key not in held:
        start = time.process_time()
        found = gates.run(replace(task, tell=_progress))
        held[key] = {"scores": {n: torch.as_tensor(s) for n, s in found.scores.items()},
                     "counts": dict(found.counts), "stock": found.stock,
                     "seconds": time.process_time() - start, "notes": task.notes}
        torch.save(held, place)
    one = held[key]
    groups = tuple(g for g in task.candidates if g.name in one["counts"])
    return Scored(registry.find("importance", gates.criterion), groups,
                  {n: s.numpy() for n, s in one["scores"].items()}, one["counts"],
                  one["stock"], bench.context), one["seconds"]


def _progress(stage: str, done: int, total: int) -> None:
    print(f"{stage} ({done}/{total}, {time.process_time():.0f} s)", file=sys.stderr, flush=True)


def run(bench: Bench, methods: Mapping[str, Method], shares: Sequence[str]) -> None:
    """Fill the cells that are not done yet, row by row."""
    rows = bench.done.setdefault("rows", {})
    if "dense" not in rows:
        rows["dense"] = {"100%": {
            "parameters": sum(p.numel() for p in bench.module.parameters()), "body": 1.0,
            **{t: perplexity(bench.module, ids, batch=2) for t, ids in bench.texts.items()}}}
        bench.save()
    for share in shares:
        for name, method in methods.items():
            cells = rows.setdefault(name, {})
            if share not in cells:
                cells[share] = measure(bench, name, method, share)
                bench.save()
                print(f"{name:22}{share:5}" + "".join(
                    f"{t} {cells[share][t]:.2f}  " for t in bench.texts), flush=True)


# --- table and picture ------------------------------------------------------------------------


def table(done: Mapping[str, Any], shares: Sequence[str]) -> str:
    """Return the results as a Markdown table."""
    texts = done["protocol"]["evaluated"]
    head = ["method", *(f"{s} {t}" for s in shares for t in texts), "CPU s", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, cells in done["rows"].items():
        dense = cells.get("100%")
        values = [_number((dense or cells.get(s, {})).get(t)) for s in shares for t in texts]
        some = [c for c in cells.values() if "cpu_seconds" in c]
        seconds = f"{max((c['cpu_seconds'] for c in some), default=0):.0f}"
        memory = f"{max((c['memory_mb'] for c in some), default=0)}"
        lines.append("| " + " | ".join([name, *values, seconds, memory]) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def picture(done: Mapping[str, Any], path: Path) -> None:
    """Draw perplexity against the size of the body, one panel per text (needs matplotlib)."""
    from matplotlib import pyplot

    texts = list(done["protocol"]["evaluated"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(6 * len(texts), 5), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for name, cells in done["rows"].items():
            points = sorted((c["body"], c[text]) for c in cells.values())
            if name == "dense":
                panel.axhline(points[0][1], color="grey", linestyle=":", label="dense")
            else:
                panel.plot(*zip(*points, strict=True), marker="o", label=name,
                           linewidth=3 if name.startswith("ours") else 1)
        panel.set(yscale="log", xlabel="share of the body that stays", ylabel="perplexity",
                  title=text)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --- command line -----------------------------------------------------------------------------


def texts(tokenizer: Any, data: Path | None, count: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return calibration windows, and the first `count` windows of each evaluation text."""
    if data is None:
        held_out = windows(tokenizer, python_text("held-out"), LENGTH)[:count]
        return windows(tokenizer, python_text(), LENGTH), {"Python": held_out}
    read = {name: windows(tokenizer, (data / path).read_text(encoding="utf-8"), LENGTH)
            for name, path in (("valid", "wikitext2/valid.txt"), ("WikiText-2",
                               "wikitext2/test.raw"), ("PTB", "ptb/valid.txt"))}
    return read.pop("valid"), {name: ids[:count] for name, ids in read.items()}


def own(text: str) -> tuple[str, Method]:
    """Return a row for `file.py:Class`."""
    path, _, attribute = text.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return attribute, Method(getattr(module, attribute)())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with wikitext2/ and ptb/")
    parser.add_argument("--json", type=Path, default=Path("quality.json"), help="results so far")
    parser.add_argument("--only", action="append", default=[], help="pattern over rows")
    parser.add_argument("--also", action="append", default=[], help="file.py:Criterion")
    parser.add_argument("--share", action="append", default=[], help="80%%, 65%%, 50%%")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--samples", type=int, default=48, help="calibration windows")
    parser.add_argument("--windows", type=int, default=6, help="evaluation windows per text")
    parser.add_argument("--choice", choices=CHOICES, default="random", help="of those windows")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    given = arguments(argv)
    random.seed(given.seed)
    torch.manual_seed(given.seed)
    found = source.load("zoo:smollm2-135m")
    module, inputs, tokenizer = found.module, found.inputs, found.tokenizer
    ids, evaluated = texts(tokenizer, given.data, given.windows)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(given.seed)) \
        if given.choice == "random" else by_prototype(
            module.get_input_embeddings().weight.detach(), given.choice, given.seed)(ids)
    bench = Bench(module, inputs, tokenizer, ids[order[: given.samples]], evaluated, given.json,
                  given.seed)
    bench.done = json.loads(given.json.read_text()) if given.json.exists() else {}
    protocol = {"model": "SmolLM2-135M-Instruct", "window": LENGTH, "seed": given.seed,
                "calibration_windows": given.samples, "threads": torch.get_num_threads(),
                "evaluated": {name: len(rows) for name, rows in evaluated.items()}}
    if given.choice != "random":
        protocol["choice"] = given.choice
    if bench.done.setdefault("protocol", protocol) != protocol:
        raise SystemExit(f"{given.json} was made by another protocol; give another --json")
    methods = {**METHODS, **dict(own(text) for text in given.also)}
    if given.only:
        methods = {n: m for n, m in methods.items()
                   if any(fnmatch.fnmatch(n, p) for p in given.only) or n in [
                       t.rpartition(":")[2] for t in given.also]}
    shares = given.share or SHARES
    bench.analyse()
    measurements.angles = once(measurements.angles)
    gather(bench, methods)
    run(bench, methods, shares)
    print(table(bench.done, shares))
    if given.picture:
        picture(bench.done, given.picture)


if __name__ == "__main__":
    main()
