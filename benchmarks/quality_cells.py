"""The cells of quality.py: one row at one share, allocated, repaired, sliced and evaluated."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from quality_bench import Bench, give, peak
from quality_rows import Method

import spacompiler
from spacompiler.pipeline import finish
from spacompiler.pipeline.decide import allocate_counts, decide
from spacompiler.pipeline.request import Given, make_request
from spacompiler.pipeline.score import scheduling
from spacompiler.request import registry
from spacompiler.request.recipe import Recipe
from spacompiler.stages.records import Scored, Traced


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
        give(bench.context, bench.inputs_of[method.continued])
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
             **bench.perplexities(emitted.model)}
    bench.restore()
    return found


def compiled(bench: Bench, method: Method, share: str) -> dict[str, Any]:
    """Compile with no options but the target (and the text), proof and all, and evaluate."""
    text = str(bench.text) if method.given_text and bench.text else None
    start = time.process_time()
    with peak() as memory:
        result = spacompiler.compile(bench.model.source, target=f"body={share}", onnx=False,
                                     latency=False, calibration=text, seed=bench.seed)
    costs, spent = result.plan.costs, time.process_time() - start
    return {"parameters": costs["params"]["pruned"],
            "body": costs["body"]["pruned"] / costs["body"]["dense"],
            "cpu_seconds": round(spent, 1), "memory_mb": memory[0],
            "notes": list(result.job.notes), **bench.perplexities(result.module)}


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
            **bench.perplexities(bench.module)}}
        bench.save()
    for share in shares:
        for name, method in methods.items():
            cells = rows.setdefault(name, {})
            if share not in cells:
                cells[share] = measure(bench, name, method, share) if method.importance \
                    else compiled(bench, method, share)
                bench.save()
                print(f"{name:22}{share:5}" + "".join(
                    f"{t} {cells[share][t]:.2f}  " for t in bench.texts), flush=True)
