"""Write a finished job: weights, config, ONNX, plan, report, manifest; and check the files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from . import artifact, beside, report
from .biases import added
from .choices import indices
from .emit import hf
from .emit.attributes import differing
from .errors import ProofError, SpaError
from .frontends.torch_export import Trace
from .job import Job
from .proof import relative_error
from .slicing import norm_changes
from .torch_backend import pruned_program

ONNX_TOLERANCE = 1e-3
RELOAD_TOLERANCE = 1e-6


def write(job: Job, out: Path) -> dict[str, Any]:
    """Write the artifact of a job to a new directory and return the report's data.

    Raises SpaError, leaving nothing behind, if any file cannot be written or a check fails.
    """
    data = report.facts(job)
    data["bytes"] = report.pruned_bytes(job.solution, job.choices)
    data["bytes"]["dense"] = job.whole.get("bytes", data["bytes"]["dense"])
    with artifact.whole(out) as folder:
        job.progress("writing weights", 0, 4)
        job.backend.write(job, folder, data)
        if job.recipe.int8:
            from .deploy import write_int8

            data.update(write_int8(job, folder))
        job.progress("writing the report", 3, 4)
        (folder / "plan.json").write_text(job.plan.to_json(), encoding="utf-8")
        artifact.write_json(folder / "slices.json", slices(job))
        if job.kept is not None:
            job.kept.save(folder / "adapter")
        artifact.write_json(folder / "recipe.json", {
            "model": job.name, **job.recipe.as_dict(), "importance": repr(job.importance),
            "allocation": repr(job.allocation),
            "repair": "none" if job.compensation is None else repr(job.compensation),
            "calibration": job.calibration.origin})
        artifact.write_json(folder / "report.json", data)
        (folder / "report.md").write_text(report.markdown(data), encoding="utf-8")
        artifact.write_manifest(folder)
    return data


def write_module(job: Job, folder: Path, data: dict[str, Any]) -> None:
    """Write a pruned torch module: weights that load again, and ONNX."""
    _weights(job, folder)
    job.progress("checking the reload", 1, 4)
    data["reload"] = _reload(job, folder)
    if job.folder is not None:
        data["files"] = beside.carry(job.folder, folder, _widths(job)).as_dict()
    if job.recipe.decoder or job.recipe.onnx:
        job.progress("exporting ONNX", 2, 4)
    if job.recipe.decoder:
        from .deploy import write_decoder

        data.update(write_decoder(job, folder))
    elif job.recipe.onnx:
        data["onnx"], data["latency"] = _onnx(job, folder)


def _weights(job: Job, folder: Path) -> None:
    if job.layout == "uniform":
        hf.save(job.pruned, folder, _tokenizer(job))
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)
        return
    if job.emission == "program" and not hasattr(job.pruned, "body"):
        raise SpaError("parts that were re-written as programs cannot be saved", where=job.name,
                       why="; ".join(job.notes[-2:]),
                       fix="use the module in memory, or --ignore the groups of that part")
    module = job.pruned.body if job.emission == "program" else job.pruned
    sliced = _sliced_buffers(job) if job.emission == "module" else {}
    artifact.save_weights(folder / "model.safetensors", module, sliced)
    if hf.is_hf(job.module):
        config = job.reference.config.to_dict()
        artifact.write_json(folder / "dense_config.json", config)
        if _tokenizer(job) is not None:
            job.tokenizer.save_pretrained(folder)


def _tokenizer(job: Job) -> Any:
    """The tokenizer to save: none where its files go along as they lie."""
    carried = job.folder is not None and beside.has_tokenizer(job.folder)
    return None if carried else job.tokenizer


def _widths(job: Job) -> dict[int, int]:
    """Which width of the hidden state became which: what modules behind the network read."""
    if not (hf.is_hf(job.reference) and hf.is_hf(job.pruned)):
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


def _sliced_buffers(job: Job) -> dict[str, torch.Tensor]:
    """Buffers that a state dict leaves out, where a plan changed their shape."""
    dense, kept = dict(job.module.named_buffers()), job.pruned.state_dict()
    return {name: tensor for name, tensor in job.pruned.named_buffers()
            if name not in kept and name in dense and tensor.shape != dense[name].shape}


def _results(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(module(*args, **kwargs))
                if isinstance(x, torch.Tensor)]


def _reload(job: Job, folder: Path) -> str:
    """Load what was written by the means a user has; arrays must be bit-equal, results too.

    (Kernels may round differently when an array lies elsewhere in memory; the report says so.)
    """
    from .loading import load_folder

    want = _results(job.pruned.eval(), job.trace.args, job.trace.kwargs)
    artifact.save_check(folder / "check.safetensors", job.trace.args, job.trace.kwargs, want)
    artifact.write_json(folder / "structure.json", structure(job))
    (folder / "plan.json").write_text(job.plan.to_json(), encoding="utf-8")
    artifact.write_json(folder / "slices.json", slices(job))
    again = load_folder(folder, model=job.reference)
    got = _results(again, job.trace.args, job.trace.kwargs)
    if _differing_array(job.pruned, again) or relative_error(got, want) > RELOAD_TOLERANCE:
        raise ProofError("the reloaded model differs from the one in memory",
                         where=_differing_array(job.pruned, again) or "its results",
                         fix="please report it")
    if all(map(torch.equal, got, want)):
        return "bit-equal"
    return f"arrays bit-equal, results to {relative_error(got, want):.1e}"


def _differing_array(one: torch.nn.Module, other: torch.nn.Module) -> str:
    """Return the name of the first array in which two modules differ, or "" if there is none."""
    a, b = one.state_dict(), other.state_dict()
    return next((k for k in sorted(a.keys() | b.keys())
                 if k not in a or k not in b or not torch.equal(a[k], b[k])), "")


def structure(job: Job) -> dict[str, Any]:
    """Return what a loader needs beside the weights."""
    attributes = [] if job.layout == "uniform" or job.emission == "program" else \
        [list(change) for change in differing(job.module, job.pruned)]
    cls = type(job.module)
    return {"layout": job.layout, "emission": job.emission, "model": job.name,
            "source": {"kind": job.source.get("kind", "module"), "unused": job.recipe.unused},
            "class": f"{cls.__module__}.{cls.__qualname__}", "attributes": attributes,
            "trained": job.trained is not None,
            "dropped": list(job.dropped.paths) if job.dropped else [],
            "biased": added(job.module, job.arrays),
            "inputs": {"args": len(job.trace.args), "kwargs": list(job.trace.kwargs),
                       "constants": {k: v for k, v in job.trace.kwargs.items()
                                     if not isinstance(v, torch.Tensor)}}}


def slices(job: Job) -> dict[str, Any]:
    """Return, per stored array that changed, the kept indices of each dimension.

    Equal index lists are stored once; `null` keeps a whole dimension; arrays whose values were
    corrected besides (gains of RMSNorms) are listed with their factor, repaired ones by name.
    `weights_hash` is that of the dense model, without the adapter if one was kept.
    """
    lists: dict[tuple[int, ...], str] = {}
    arrays: dict[str, Any] = {}
    for name, dims in job.solution.weights().items():
        per_axis = indices(dims, job.choices)
        if per_axis is None:
            arrays[name] = "joint"
        elif any(index is not None for index in per_axis):
            arrays[name] = [None if i is None else _shared(lists, i) for i in per_axis]
    gains = {c.norm.gain: {"factor": c.gain, "offset": c.norm.offset}
             for c in norm_changes(job.solution, job.choices)}
    shapes = {n: [e.size for e in dims] for n, dims in job.solution.weights().items()
              if n in arrays}
    repaired = [name for name, first in job.trace.tied.items() if first in job.trace.repaired]
    return {"indices": {key: list(index) for index, key in lists.items()}, "arrays": arrays,
            "shapes": shapes, "corrected": gains, "repaired": repaired,
            "weights_hash": job.base_hash or job.plan.weights_hash}


def _shared(lists: dict[tuple[int, ...], str], index: np.ndarray) -> str:
    return lists.setdefault(tuple(index.tolist()), str(len(lists)))


# --- ONNX -------------------------------------------------------------------------------------


def other_inputs(trace: Trace, which: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs at other sizes than those traced: values repeat, cut or tiled.

    Equal traced sizes of varying dimensions change alike.
    """
    sizes = sorted({t.shape[d] for n in trace.graph.inputs
                    for t in (trace.graph.tensors[n],) for d in t.dynamic})
    new = {old: max(1, [old + 1 + i, max(1, old // 2) + i][which % 2])
           for i, old in enumerate(sizes)}
    names = iter(trace.graph.inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = trace.graph.tensors[next(names)]
        for d in sorted(tensor.dynamic):
            index = torch.arange(new[value.shape[d]]) % value.shape[d]
            value = value.index_select(d, index)
        return value

    args, kwargs = pytree.tree_map(resize, (trace.args, trace.kwargs))
    return args, kwargs


def _feed(trace: Trace, args: Any, kwargs: Any) -> dict[str, np.ndarray]:
    tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    return {name: t.numpy() for name, t in zip(trace.graph.inputs, tensors, strict=True)}


def axis_names(trace: Trace) -> dict[str, dict[int, str]]:
    """Readable names of varying dimensions: batch, sequence, then axis numbers."""
    names = {0: "batch", 1: "sequence"}
    return {n: {d: names.get(d, f"axis{d}") for d in trace.graph.tensors[n].dynamic}
            for n in trace.graph.inputs if trace.graph.tensors[n].dynamic}


def _onnx(job: Job, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    from .emit.onnx_file import export_onnx
    from .emit.parity import parity

    path = folder / "model.onnx"
    program = pruned_program(job)
    export_onnx(program, path, input_names=job.trace.graph.inputs, axes=axis_names(job.trace),
                beside=sorted(folder.glob("model*.safetensors")))
    sets = [other_inputs(job.trace, k) for k in (0, 1)]
    feeds = [_feed(job.trace, *s) for s in sets]
    found = {id(feed): s for feed, s in zip(feeds, sets, strict=True)}

    def reference(feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return [r.numpy() for r in _results(job.pruned, *found[id(feed)])]

    checks = parity(path, reference, feeds)
    for check in checks:
        if not check.max_abs <= ONNX_TOLERANCE and not check.max_rel <= ONNX_TOLERANCE:
            raise ProofError(f"ONNX Runtime differs from torch by {check.max_abs:.1e}",
                             where=str(check.shapes), fix="use --no-onnx, and please report it")
    rows = [{"shapes": {k: list(v) for k, v in c.shapes.items()}, "max_abs": c.max_abs,
             "max_rel": c.max_rel} for c in checks]
    return rows, _latency(job, path) if job.recipe.latency else None


def _latency(job: Job, path: Path) -> dict[str, Any]:
    from .emit.latency import compare_latency
    from .emit.onnx_file import export_onnx

    job.progress("measuring latency", 3, 4)
    with tempfile.TemporaryDirectory(prefix="spacompiler-") as temporary:
        dense = Path(temporary) / "dense.onnx"
        whole = job.trace if job.dense is None else job.backend.trace(job.dense, job.inputs)[0]
        export_onnx(whole.exported, dense, input_names=whole.graph.inputs)
        args, kwargs = latency_inputs(job.trace)
        times = compare_latency({"dense": dense, "pruned": path}, _feed(job.trace, args, kwargs))
    shapes = {n: list(a.shape) for n, a in _feed(job.trace, args, kwargs).items()}
    return {**{n: {"median_ms": t.median, "best_ms": t.best, "cpu_median_ms": t.cpu_median}
               for n, t in times.items()}, "threads": 1, "shapes": shapes}


def latency_inputs(trace: Trace, length: int = 128) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return example inputs for timing: batch 1, sequences of `length`."""
    names = iter(trace.graph.inputs)

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dynamic = trace.graph.tensors[next(names)].dynamic
        for d in sorted(dynamic):
            size = 1 if d == 0 else length
            value = value.index_select(d, torch.arange(size) % value.shape[d])
        return value

    args, kwargs = pytree.tree_map(resize, (trace.args, trace.kwargs))
    return args, kwargs
