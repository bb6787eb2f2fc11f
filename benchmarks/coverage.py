"""How much of a model library compiles: each model is traced, solved, pruned, proved and run.

    python benchmarks/coverage.py transformers --only 'qwen*' --out coverage.md

Each model runs in a process of its own. A row says which share of the body's weights lies in
prunable groups, and whether half of the body could be removed with a proof.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from coverage_report import TARGET, Row, report, summary, table
from torch import nn

from spacompiler.artifact.write import write
from spacompiler.axes.expressions import reasons, walk
from spacompiler.deploy.export import export_onnx
from spacompiler.errors import ProofError, SpaError, TargetError
from spacompiler.evidence.calls import Inputs
from spacompiler.groups.cost import heads
from spacompiler.groups.solution import Solution, solve
from spacompiler.pipeline.analyse import trace_whole_or_parts
from spacompiler.pipeline.prepare import check_weights
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.run import resumed
from spacompiler.plan.legal import candidates
from spacompiler.request.recipe import ROLES, Recipe
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.compiled import Compiled
from spacompiler.stages.proof import relative_error
from spacompiler.stages.records import Request, Subject, Traced
from spacompiler.torch_backend.emit.program import run_pruned
from spacompiler.torch_backend.parts import Parts
from spacompiler.torch_backend.prove import masked_dense
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

SUITES = {"transformers": "tiny_transformers", "torchvision": "tiny_torchvision",
          "timm": "tiny_timm", "packages": "package_networks"}
NEAR = 1e-3
WIDEN = False
"""Whether a target that is out of reach of the default roles is tried with all of them."""
DEFAULT: dict[str, Any] = {"importance": "magnitude", "align": 1, "layout": "any", "onnx": False,
                           "latency": False}


# --- one model --------------------------------------------------------------------------------


def measure(suite: str, model: str) -> Row:
    """Trace, solve, compile and check one model; failures are results too."""
    torch.set_num_threads(1)
    if suite == "packages":
        import packages

        return packages.measure(model)
    row = Row(model)
    try:
        module, inputs = importlib.import_module(SUITES[suite]).MODELS[model]()
        row.weights = sum(p.numel() for p in module.parameters())
        start = time.process_time()
        first = _analyse(row, module, inputs)
        job = _compile(row, first)
        row.cpu_s = time.process_time() - start
        _check(row, job, first)
        row.reload, row.generate = _reloads(job), _generates(job)
    except Exception as problem:  # any failure is what this benchmark is about
        row.kind = "wrong" if isinstance(problem, ProofError) else \
            "target" if isinstance(problem, TargetError) else "error"
        row.result = _told(problem)
    row.rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def _told(problem: Exception) -> str:
    if isinstance(problem, SpaError):
        parts = [problem.what, problem.where, problem.why]
        return " | ".join(p.splitlines()[0] for p in parts if p)
    last = traceback.extract_tb(problem.__traceback__)[-1]
    first = (str(problem).strip().splitlines() or [""])[0]
    return f"{type(problem).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"


First = tuple[Request, Subject, Traced]


def _analyse(row: Row, module: nn.Module, inputs: Inputs) -> First:
    recipe = Recipe(TARGET, **DEFAULT)
    ask, subject = make_request(module, inputs, recipe,
                                Given(calibration="none", name=row.model))
    ask, subject, traced = trace_whole_or_parts(ask, check_weights(ask, subject))
    row.traced = not isinstance(subject.model, Parts)
    start = time.perf_counter()
    traced = replace(traced, solution=solve(traced.trace.graph, TABLE))
    row.solve_ms = 1000 * (time.perf_counter() - start)
    row.groups = len(traced.solution.groups)
    row.opaque = dict(Counter(node.op for node in traced.solution.solver.opaque))
    row.clashes = traced.solution.solver.space.clashes
    row.share, row.frozen = _share(traced.solution)
    return ask, subject, traced


def _share(solution: Solution) -> tuple[float, dict[str, int]]:
    """The share of body weights with a free dimension, and why the others have none."""
    free, skip = set(solution.by_atom()), heads(solution)
    total = prunable = 0
    stuck: Counter[str] = Counter()
    for name, tensor in solution.graph.weights().items():
        if name in skip or tensor.kind not in ("parameter", "outside"):
            continue
        numel = torch.Size(tensor.shape).numel()
        total += numel
        dims = solution.dims(name)
        if any(atom in free for e in dims for atom in walk(e)):
            prunable += numel
            continue
        wide = [e for e in dims if e.size > 1]
        why = " & ".join(dict.fromkeys(reasons(e)[0] for e in wide if reasons(e)))
        stuck[why or "single numbers"] += numel
    return prunable / max(total, 1), dict(stuck.most_common())


def _attempt(first: First, **options: Any) -> Compiled:
    """The steps after the analysis, under another recipe."""
    ask, subject, traced = first
    r = replace(ask.recipe, **options)
    found = candidates(traced.solution, roles=r.roles, approximate=r.approximate)
    if not found:
        raise TargetError(f"no group of {len(traced.solution.groups)} may shrink")
    return resumed(replace(ask, recipe=r, notes=[]), subject,
                   replace(traced, candidates=tuple(found)))


def _compile(row: Row, first: First) -> Compiled:
    try:
        job = _attempt(first)
    except TargetError as short:
        if not WIDEN:
            raise
        row.notes.append(_told(short))
        row.roles = "all"
        job = _attempt(first, roles=ROLES, approximate=True)
    row.emission = f"{job.layout}/{job.emission}" + ("" if row.traced else " in parts")
    row.exact = not any(g.approximate for g in job.solution.groups.values()
                        if g.atom in job.choices)
    row.notes.extend(n for n in job.notes if "not possible" in n)
    return job


def _check(row: Row, job: Compiled, first: First) -> None:
    """Compare what was emitted (of parts: the parts) with the masked dense program."""
    row.kind = row.result = "ok"
    model = job.pruned if row.traced else Parts(job.pruned, first[1].model.paths)
    trace = first[2].trace
    for which, call in (("traced inputs", (trace.args, trace.kwargs)),
                        ("other inputs", _others(trace))):
        error = _error(model, trace, job, call)
        if not error <= max(NEAR, 2 * _noise(trace, job, call, error)):
            row.kind, row.result = "wrong", f"emitted model differs by {error:.1e} on {which}"
            return


def _noise(trace: Trace, job: Compiled, call: tuple[Any, Any], error: float) -> float:
    """How far float32 itself is from float64 on the pruned program, asked if it may matter."""
    if error <= NEAR:
        return 0.0
    at = replace(trace, args=call[0], kwargs=call[1])
    single, double = (run_pruned(at, job.solution, job.choices, double=d) for d in (False, True))
    return relative_error(single, double)


def _error(model: nn.Module, trace: Trace, job: Compiled, call: tuple[Any, Any]) -> float:
    """How far the emitted model is from the masked dense one in float64."""
    args, kwargs = call
    want = masked_dense(replace(trace, args=args, kwargs=kwargs), job.solution, job.choices)
    with torch.no_grad():
        got = torch.utils._pytree.tree_leaves(model.eval()(*args, **kwargs))
    tensors = [[t for t in ts if isinstance(t, torch.Tensor)] for ts in (got, want)]
    return relative_error(*tensors)


def _reloads(job: Compiled) -> str:
    """Whether the artifact of a module loads again with the same arrays and results."""
    if job.emission != "module":
        return ""
    with tempfile.TemporaryDirectory() as place:
        try:
            return str(write(job, Path(place) / "artifact")["reload"])
        except SpaError as problem:
            return f"{problem.what} ({problem.why})"


def _generates(job: Compiled) -> str:
    """Whether a pruned module generates; the first token must be that of one forward pass."""
    module, ids = job.pruned, job.trace.kwargs.get("input_ids")
    if job.emission != "module" or ids is None or not getattr(
            module, "can_generate", lambda: False)():
        return ""
    inputs: dict[str, Any] = dict(job.trace.kwargs)
    started: dict[str, Any] = {}
    if "decoder_input_ids" in inputs:  # decode from the first token, without the traced ones
        inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
        inputs["decoder_input_ids"] = torch.zeros(len(ids), 1, dtype=torch.long)
        started["decoder_start_token_id"] = 0
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    try:
        with torch.no_grad():
            made = module.generate(**tensors, **started, max_new_tokens=3, do_sample=False)
            logits = module(**inputs).logits
    except Exception as problem:  # any code may run here
        return _told(problem)
    length = inputs.get("decoder_input_ids", ids).shape[1]
    return "yes" if torch.equal(made[:, length], logits[:, -1].argmax(-1)) else "another token"


def _others(trace: Trace) -> tuple[Any, Any]:
    """Inputs that were not traced, of the same sizes."""
    def other(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        if value.is_floating_point():
            return value.flip(0) + 0.1 * torch.randn_like(value)
        return value.roll(1, -1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.utils._pytree.tree_map(other, (trace.args, trace.kwargs))


# --- all models -------------------------------------------------------------------------------


def _child(task: Callable[[], Any], out: Any, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    out.send(asdict(task()))


def isolated(task: Callable[[], Any], limit: float) -> dict[str, Any]:
    """A task in a process of its own, ended when its CPU time is up: its fields, or its `result`.

    A machine that others use stretches the clock, not the CPU time: the clock gets 20 times more.
    """
    context = multiprocessing.get_context("fork")
    with _FORK:
        inlet, outlet = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(task, outlet, int(limit)))
        process.start()
        outlet.close()
    try:
        if inlet.poll(20 * limit):
            return dict(inlet.recv())
        return {"result": f"no result within {20 * limit:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return {"result": f"no result within {limit:.0f} s of CPU time"}
        return {"result": f"the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


_FORK = threading.Lock()


def wanted(suite: str, only: str, table: str = "MODELS") -> list[str]:
    """The suite's models whose names match, in its order."""
    module = importlib.import_module(SUITES[suite])
    models = getattr(module, table, module.MODELS)
    return [m for m in models if any(fnmatch.fnmatch(m, p) for p in only.split(","))]


def run(suite: str, models: list[str], jobs: int, limit: float) -> Iterator[Row]:
    """Yield a row for each model, in order."""
    def row(model: str) -> Row:
        return Row(**{"model": model, **isolated(partial(measure, suite, model), limit)})

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(row, models)


def beside(suite: str, peer: str, only: str, limit: float, path: Path | None) -> str:
    """The text of a comparison with another tool, model by model; those in a file are kept."""
    known = json.loads(path.read_text()) if path and path.exists() else {}
    pairs = []
    for model in wanted(suite, only, "NATURAL"):
        known[model] = known.get(model) or [
            {"model": model, **isolated(partial(tool, SUITES[suite], model), limit)}
            for tool in (peers.ours, peers.PEERS[peer])]
        if path:
            path.write_text(json.dumps(known, indent=1))
        pair = [peers.Timing(**timing) for timing in known[model]]
        pairs.append((pair[0], pair[1]))
        print(f"{model:28} ours {pair[0].total_s:6.2f} s {pair[0].result[:40]:40}  "
              f"{peer} {pair[1].total_s:6.2f} s {pair[1].result[:60]}", flush=True)
    head = ("model", "find groups, s", "theirs", "compile, s", "theirs", "memory", "theirs",
            "result", "theirs")
    cells = [(a.model, f"{a.find_s:.4f}", f"{b.find_s:.4f}", f"{a.total_s:.2f}",
              f"{b.total_s:.2f}", f"{a.room:.2f}", f"{b.room:.2f}", a.result.replace("|", "/"),
              b.result.replace("|", "/")) for a, b in pairs]
    told = peers.summary(peer, pairs)
    print(told)
    return "\n\n".join([
        f"# {suite}: beside {peer}",
        f"Made by `python benchmarks/coverage.py {suite} --peer {peer} --timeout {limit:g}`: "
        "the same work on both sides, as the top of `benchmarks/peers.py` says it: tracing counts "
        "on both, results of both are executed, and those of theirs are not checked further. "
        "Seconds are CPU seconds; memory is the peak against the model plus one forward.", told,
        table(head, cells)]) + "\n"


def _commit() -> str:
    told = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                          text=True, cwd=Path(__file__).parent)
    return told.stdout.strip()


def _known(path: Path | None) -> dict[str, Row]:
    """What earlier runs found of each model."""
    if path is None or not path.exists():
        return {}
    return {row["model"]: Row(**row) for row in json.loads(path.read_text())}


def _report(suite: str, rows: list[Row], widened: bool) -> str:
    if suite == "packages":
        import packages

        return packages.report(rows)
    return report(suite, rows, widened)


def main() -> None:
    """Read the command line, run, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--only", default="*", help="shell patterns, with commas between")
    parser.add_argument("--out", type=Path, help="write the report here")
    parser.add_argument("--json", type=Path,
                        help="write the rows here; models that stand there as right are kept")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120,
                        help="seconds of CPU time for each model")
    parser.add_argument("--widen", action="store_true",
                        help="where the default roles do not reach the target, try all roles too")
    parser.add_argument("--peer", choices=peers.PEERS, help="time another tool instead")
    options = parser.parse_args()
    globals()["WIDEN"] = options.widen
    warnings.simplefilter("ignore")
    for module in (SUITES[options.suite], "torch._dynamo", "torch.export",
                   "transformers.modeling_utils", "transformers.generation",
                   "transformers.models.auto.modeling_auto", export_onnx.__module__):
        importlib.import_module(module)  # once, before the processes fork
    torch.set_num_threads(1)
    trace(nn.Linear(2, 2), (torch.zeros(2, 2),))
    if options.peer:
        text = beside(options.suite, options.peer, options.only, options.timeout,
                      options.json)
        if options.out:
            options.out.write_text(text)
        return
    known, commit = _known(options.json), _commit()
    names = [n for n in wanted(options.suite, options.only)
             if n not in known or known[n].kind != "ok"]
    for row in run(options.suite, names, options.jobs, options.timeout):
        known[row.model] = replace(row, commit=commit)
        rows = [known[n] for n in wanted(options.suite, "*") if n in known]
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        share = f"{row.share:.0%}" if row.share is not None else "-"
        print(f"{row.model:28} {share:>5} {row.roles:4} {row.emission:12} {row.cpu_s:5.1f} s  "
              f"{row.result[:140]}", flush=True)
    rows = [known[n] for n in wanted(options.suite, "*") if n in known]
    print(summary(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(_report(options.suite, rows, options.widen))


if __name__ == "__main__":
    main()
