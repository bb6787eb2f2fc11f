"""One network of a package: compiled with the default roles, saved with ONNX, checked apart."""

from __future__ import annotations

import re
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import independent
import package_networks
import torch
from coverage_report import Row

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
        row.kind = "wrong" if "off by" in row.reload else "ok"
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
