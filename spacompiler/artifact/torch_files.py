"""The files of a pruned torch module, each checked as it lies there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..axes.choices import kept_size
from ..deploy.cases import LENGTH
from ..deploy.inputs import axis_names, feed, latency_inputs, other_inputs
from ..errors import ProofError, SpaError
from ..plan.effects import edits, gather_indices
from ..request.amounts import parse_size
from ..stages.compiled import Compiled
from ..stages.proof import relative_error
from ..stages.tolerances import ONNX, RELOAD_MODULE
from ..store import beside
from ..store.arrays import same_bits, save_check, save_weights
from ..store.folder import write_json
from ..store.mapped import let_go
from ..system.staging import Scratch
from ..torch_backend.backend import pruned_program
from ..torch_backend.emit import stock as hf
from ..torch_backend.emit.attributes import differing
from ..torch_backend.emit.biases import added
from ..torch_backend.gather.texts import positions
from ..torch_backend.kinds import is_encoder_decoder, is_hf
from ..torch_backend.own_layers import stock_of
from ..torch_backend.weights import results
from .measured import measured
from .places import onnx_place, tell_in_config
from .slices import plan_text, slices, without_places


def write_module(job: Compiled, folder: Path, data: dict[str, Any]) -> None:
    """Write a pruned torch module: weights that load again, and ONNX."""
    began = time.monotonic()
    _weights(job, folder)
    made = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    seconds = max(time.monotonic() - began, 1e-9)
    job.progress(f"writing weights: {made / 1e6:,.0f} MB, {made / 1e6 / seconds:,.0f} MB/s", 1, 4)
    job.progress("checking the reload", 1, 4)
    data["reload"] = _reload(job, folder)
    if job.folder is not None:
        data["files"] = beside.carry(job.folder, folder, _widths(job)).as_dict()
    if job.recipe.decoder or job.recipe.onnx or job.recipe.gguf:
        job.progress("exporting", 2, 4)
    if job.recipe.gguf:
        from .deployed import write_gguf_file

        data["gguf"] = write_gguf_file(job, folder)
    both = is_encoder_decoder(job.pruned)
    if job.recipe.decoder:
        from .deployed import write_decoder, write_pair

        data.update((write_pair if both else write_decoder)(job, folder))
    if job.recipe.onnx and (both or not job.recipe.decoder):
        data["onnx"], data["latency"] = _onnx(job, folder)
    tell_in_config(job, folder)
    if job.recipe.runtime:
        from .deployed import run_there

        data["runtime"] = run_there(job, folder)


def _weights(job: Compiled, folder: Path) -> None:
    if job.layout in ("uniform", "per-layer"):
        hf.save(job.pruned, folder, _tokenizer(job), parse_size(job.recipe.shard_size))
        return
    if job.emission == "program" and not hasattr(job.pruned, "body"):
        raise SpaError("parts that were re-written as programs cannot be saved", where=job.name,
                       why="; ".join(job.notes[-2:]),
                       fix="use the module in memory, or --ignore the groups of that part")
    module = job.pruned.body if job.emission == "program" else job.pruned
    sliced = _sliced_buffers(job) if job.emission == "module" else {}
    save_weights(folder / "model.safetensors", module, sliced)
    if is_hf(job.module):
        config = job.reference.config.to_dict()
        write_json(folder / "dense_config.json", {
            **config, "_name_or_path": Path(config.get("_name_or_path") or "").name})
        tokenizer = _tokenizer(job)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def _tokenizer(job: Compiled) -> Any:
    """The tokenizer to save: none where its files go along as they lie, or it cannot be saved."""
    carried = job.folder is not None and beside.has_tokenizer(job.folder)
    if carried or job.tokenizer is None or hasattr(job.tokenizer, "save_pretrained"):
        return None if carried else job.tokenizer
    job.notes.append(f"the tokenizer is not saved: a {type(job.tokenizer).__name__} has no "
                     "save_pretrained")
    return None


def _widths(job: Compiled) -> dict[int, int]:
    """Which width of the hidden state became which: what modules behind the network read."""
    if not (is_hf(job.reference) and is_hf(job.pruned)):
        return {}
    found = {}
    for width in (lambda m: m.get_input_embeddings().weight.shape[-1],
                  lambda m: m.config.get_text_config().hidden_size):
        try:
            old, new = width(job.reference), width(job.pruned)
        except (AttributeError, NotImplementedError):  # there is no such thing
            continue
        if old != new:
            found[old] = new
    return found


def _sliced_buffers(job: Compiled) -> dict[str, torch.Tensor]:
    """Buffers that a state dict leaves out, where a plan changed their shape."""
    dense, kept = dict(job.module.named_buffers()), job.pruned.state_dict()
    return {name: tensor for name, tensor in job.pruned.named_buffers()
            if name not in kept and name in dense and tensor.shape != dense[name].shape}


def _reload(job: Compiled, folder: Path) -> str:
    """Load what was written by the means a user has; arrays must be bit-equal, results too.

    (Kernels may round differently when an array lies elsewhere in memory; the report says so.)
    """
    from .load import load_folder

    want = results(job.pruned.eval(), job.trace.args, job.trace.kwargs)
    save_check(folder / "check.safetensors", job.trace.args, job.trace.kwargs, want)
    write_json(folder / "structure.json", structure(job))
    (folder / "plan.json").write_text(plan_text(job), encoding="utf-8")
    write_json(folder / "slices.json", slices(job))
    again = load_folder(folder, model=job.reference)
    got = results(again, job.trace.args, job.trace.kwargs)
    odd = _differing_array(job.pruned, again)
    if odd or not relative_error(got, want) <= RELOAD_MODULE.value:
        raise ProofError("the reloaded model differs from the one in memory",
                         where=odd or "its results", fix="please report it")
    if all(map(torch.equal, got, want)):
        return "bit-equal"
    return f"arrays bit-equal, results to {relative_error(got, want):.1e}"


def _differing_array(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """Return the name of the first array in which two modules differ, or "" if there is none."""
    a, b = one.state_dict(), other.state_dict()
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or not same_bits(a[name], b[name]):
            return name
        let_go((a[name], b[name]))
    return ""


def structure(job: Compiled) -> dict[str, Any]:
    """Return what a loader needs beside the weights."""
    stock = job.layout in ("uniform", "per-layer")
    attributes = [] if stock or job.emission == "program" else \
        [list(change) for change in differing(job.module, job.pruned)]
    cls = stock_of(type(job.module)) or type(job.module)
    return {"layout": job.layout, "emission": job.emission, "model": without_places(job)(job.name),
            "source": {"kind": job.source.get("kind", "module"), "unused": job.recipe.unused},
            "class": f"{cls.__module__}.{cls.__qualname__}", "attributes": attributes,
            "trained": job.trained is not None,
            "dropped": list(job.dropped.paths) if job.dropped else [],
            "factored": dict(job.now.factored.ranks) if job.now.factored else {},
            "biased": added(job.module, job.arrays), "parts": list(job.parts),
            "inputs": {"args": len(job.trace.args), "kwargs": list(job.trace.kwargs),
                       "constants": {k: v for k, v in job.trace.kwargs.items()
                                     if not isinstance(v, torch.Tensor)}}}


STEADY = 0.015
"""How exactly the median ratio of times has to be known for no further turn to be taken."""
ASIDE = 1 << 24
"""Bytes of a network beyond which times are taken in a process of their own, as memory is."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _onnx(job: Compiled, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    from ..deploy.export import export_onnx
    from ..deploy.parity import parity

    path, options = onnx_place(job, folder)
    program = pruned_program(job.made)
    export_onnx(program, path, input_names=job.trace.graph.inputs, axes=axis_names(job.trace),
                **options)
    sets = _served(job)
    feeds = [feed(job.trace, *s) for s in sets]
    found = {id(feed): s for feed, s in zip(feeds, sets, strict=True)}

    def reference(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [r.numpy() for r in results(job.pruned, *found[id(feed)])]

    checks = parity(path, reference, feeds)
    for check in checks:
        if not check.max_abs <= ONNX.value and not check.max_rel <= ONNX.value:
            raise ProofError(f"ONNX Runtime differs from torch by {check.max_abs:.1e}",
                             where=str(check.shapes), fix="use --no-onnx, and please report it")
    rows = [{"shapes": {k: list(v) for k, v in c.shapes.items()}, "max_abs": c.max_abs,
             "max_rel": c.max_rel} for c in checks]
    return rows, measured(job, "latency", lambda: _latency(job, path)) \
        if job.recipe.latency else None


def _served(job: Compiled) -> list[Call]:
    """Example inputs at other sizes, as far as the module itself takes them.

    Whole numbers may point into another input (the edges of a graph into its nodes): with fewer
    of these they point nowhere.
    """
    found, problem = [], ""
    for which in (0, 1):
        call = other_inputs(job.trace, which, positions(job.reference))
        try:
            results(job.pruned, *call)
        except Exception as raised:  # any code may run here
            problem = str(raised).strip().splitlines()[0] if str(raised) else type(raised).__name__
        else:
            found.append(call)
    if problem:
        job.notes.append("model.onnx was not checked at all sizes: the module itself does not take "
                         f"some ({problem})")
    return found or [(job.trace.args, dict(job.trace.kwargs))]


def _latency(job: Compiled, path: Path) -> dict[str, Any]:
    from ..runtime.latency import Latency, compare_latency

    job.progress("measuring latency", 3, 4)
    args, kwargs = latency_inputs(job.trace, min(LENGTH, positions(job.reference) or LENGTH))
    given = feed(job.trace, args, kwargs)
    size = sum(array.nbytes for array in job.trace.program.state_dict.values())

    def timed(changed: Mapping[str, torch.Tensor]) -> dict[str, Latency]:
        with _dense_file(job, path, changed) as dense:
            return compare_latency({"dense": dense, "pruned": path}, given, steady=STEADY,
                                   isolate=size > ASIDE)

    changed = _changed(job)
    try:
        times = timed(changed)
    except SpaError:
        if not changed:
            raise
        times = timed({})  # a size stands in the file that the plan did not change
    return {**{n: {"median_ms": t.median, "best_ms": t.best, "cpu_median_ms": t.cpu_median}
               for n, t in times.items()}, "threads": 1, "turns": times["pruned"].repeats,
            "shapes": {n: list(a.shape) for n, a in given.items()}}


@contextmanager
def _dense_file(job: Compiled, pruned: Path,
                changed: Mapping[str, torch.Tensor]) -> Iterator[Path]:
    """Give the dense network as an ONNX file: the pruned one with other arrays, if it is no more
    than that, else exported."""
    from ..deploy.export import export_onnx
    from ..deploy.twin import twin

    with ExitStack() as stack:
        found = stack.enter_context(twin(pruned, changed)) if changed else None
        if found is None:
            found = stack.enter_context(Scratch()) / "dense.onnx"
            whole = job.trace if job.dense is None else job.backend.trace(job.dense, job.inputs)[0]
            export_onnx(whole.exported, found, input_names=whole.graph.inputs)
        yield found


def _changed(job: Compiled) -> dict[str, torch.Tensor]:
    """The dense arrays that a plan cuts, by name; none if it changes more than arrays."""
    if job.dense is not None or any(edits(job.solution, job.choices)) \
            or gather_indices(job.solution, job.choices):
        return {}
    arrays = {**job.trace.program.state_dict, **job.trace.program.constants}
    return {name: arrays[name] for name, dims in job.solution.weights().items()
            if name in arrays and any(kept_size(e, job.choices) != e.size for e in dims)}
