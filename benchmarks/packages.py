"""One network of a package: compiled with the default roles, saved with ONNX, checked apart."""

from __future__ import annotations

import re
import resource
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import independent
import package_networks
import torch
from coverage_report import Row, table

import spacompiler
from spacompiler.errors import ProofError, SpaError, TargetError

TARGET = 60.0
_NEAREST = re.compile(r"(?:reached is|at its floor,) ([\d.]+)%")


def measure(model: str) -> Row:
    """Compile, save, reload and check one network; failures are results too."""
    row, start = Row(model, roles="default"), time.process_time()
    _, _, inputs = package_networks.ENTRIES[model]
    try:
        dense, example = package_networks.MODELS[model]()
        row.weights = sum(p.numel() for p in dense.parameters())
        result, share = _compile(dense, example)
        _note(row, result, share)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "artifact"
            result.save(folder)
            small = spacompiler.load(folder, model=dense)
            told = independent.check(dense, small, folder, partial(package_networks.draw, inputs))
        row.reload = ", ".join(f"{k}: {v}" for k, v in told.items())
        if "off by" in row.reload and _summed(result):
            row.reload = f"{_UNSAID} ({row.reload})"
        row.kind = "wrong" if "off by" in row.reload and _UNSAID not in row.reload else "ok"
        row.result = "ok" if row.kind == "ok" else row.reload
    except independent.Unchecked as problem:
        row.kind, row.result, row.reload = "ok", "ok", f"not checked apart: {problem}"
    except SpaError as problem:
        row.kind = "wrong" if isinstance(problem, ProofError) else \
            "target" if isinstance(problem, TargetError) else "error"
        row.result = " | ".join(p.splitlines()[0] for p in
                                (problem.what, problem.where, problem.why) if p)
    except Exception as problem:  # any failure is what this benchmark is about
        row.result = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:150]}"
    row.cpu_s = time.process_time() - start
    row.rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


_UNSAID = "not checked apart: a sum without weights reads what goes"


def _summed(result: Any) -> bool:
    """Whether something that goes is read by a sum, which a zero weight need not make zero."""
    job = result.job
    return any(read.how == "sum" for group in job.solution.groups.values()
               if group.atom in job.choices for read in group.reads)


def _compile(dense: torch.nn.Module, example: Any) -> tuple[Any, float]:
    """Compile to the target, or to what the error says can be reached."""
    share = TARGET
    for _ in range(3):
        try:
            return spacompiler.compile(
                dense, example, target=f"body={share:g}%", importance="magnitude", align=1,
                latency=False), share
        except TargetError as problem:
            found = _NEAREST.search(problem.why)
            if found is None or float(found[1]) == share or float(found[1]) >= 99:
                raise
            share = float(found[1])
    raise TargetError("no target of three could be met", why=f"the last was {share:g}%")


def _note(row: Row, result: Any, share: float) -> None:
    job = result.job
    row.traced = "parts" not in " ".join(job.notes)
    row.share, row.groups = share / 100, len(job.solution.groups)
    row.emission = f"{job.layout}/{job.emission}" + ("" if row.traced else " in parts")
    row.exact = not any(g.approximate for g in job.solution.groups.values()
                        if g.atom in job.choices)
    row.notes = list(job.notes)


HEAD = ("network", "package", "weights", "body stays", "emitted as", "checked apart", "CPU s",
        "result", "commit")


def report(rows: list[Row]) -> str:
    """The run as Markdown: what was tried, one row a network, and what costs classes."""
    kinds = Counter(row.kind for row in rows)
    packages = {_package(row.model) for row in rows}
    checked = [row for row in rows if row.kind == "ok" and not row.reload.startswith("not checked")]
    partly = sum(_partly(row) for row in checked)
    written = sum(row.kind == "wrong" and "off by" in row.reload for row in rows)
    commits = Counter(row.commit for row in rows)
    losses = [(row.model, n.removeprefix("layout any by module is not possible: ")[:200])
              for row in rows for n in row.notes if "not possible" in n]
    return "\n\n".join([
        "# Coverage of packages",
        "Made by `python benchmarks/coverage.py packages --json FILE --out FILE`, in "
        f"{'one run' if len(commits) == 1 else 'several runs'} on "
        f"{', '.join(f'commit {c} ({n} networks)' for c, n in commits.most_common())}. "
        "Random weights, small sizes, default roles, magnitude, "
        f"body={TARGET:g}% or the nearest that the error names; saved with ONNX, "
        "reloaded, and checked by code that knows nothing of axes (`benchmarks/independent.py`): "
        "what the plan removes is zero in a copy of the dense network, which must then compute "
        "what the reloaded one and its ONNX file do, on fresh inputs and at another batch.",
        f"- networks: {len(rows)} of {len(packages)} packages, of {len(package_networks.ENTRIES)} "
        "listed\n"
        f"- compiled, saved and reloaded: {kinds['ok']}; of these checked apart and equal: "
        f"{len(checked)} ({partly} of them not in all of the four ways: a file or program that "
        f"does not take the other batch), not checked apart: {kinds['ok'] - len(checked)}\n"
        f"- failed proofs: {kinds['wrong'] - written} (an error, nothing is written); written, "
        f"and not equal by the check apart: {written}\n"
        f"- target out of reach or nothing to prune: {kinds['target']}; other errors: "
        f"{kinds['error']}",
        table(HEAD, [_cells(row) for row in rows]),
        "## Why a class is left for a program",
        table(("network", "why"), [(m, f"`{_plain(n)}`") for m, n in losses])]) + "\n"


def _package(model: str) -> str:
    return package_networks.ENTRIES[model][0].partition(".")[0]


def _plain(text: str) -> str:
    """Text without places of this machine, for a cell."""
    text = re.sub(r"/\S*/(?=[\w.]+)", "", text.splitlines()[0])
    return text.replace("|", "/").replace("`", "'")[:220]


def _partly(row: Row) -> bool:
    return any(not part.endswith(": ok") for part in re.split(r", (?=(?:onnx|batch)\b)", row.reload)
               if ":" in part)


def _cells(row: Row) -> tuple[str, ...]:
    share = f"{row.share:.0%}" if row.share else ""
    unsaid = row.result == "ok" and row.reload.startswith("not checked")
    result = "not checked apart" if unsaid else "partly" if row.result == "ok" and _partly(row) \
        else row.result
    return (row.model, _package(row.model), f"{row.weights:,}", share, row.emission,
            _plain(row.reload) if row.reload else "", f"{row.cpu_s:.1f}", _plain(result),
            row.commit)
