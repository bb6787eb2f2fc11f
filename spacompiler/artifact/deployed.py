"""Files for deployment: a decoder with its cache, int8 weights; each checked when written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.cases import LENGTH, Sizes, synthetic
from ..deploy.cases import cases as cases_of
from ..deploy.decoder import export_decoder
from ..deploy.decoder_parity import DecoderParity, decoder_parity
from ..deploy.encoder_decoder import export_pair, pair_parity
from ..deploy.genai import genai_config
from ..deploy.gguf_file import write_gguf
from ..deploy.int8 import difference, integer_kernels, quantize
from ..deploy.runs import run_in
from ..errors import ProofError, SpaError
from ..request.profiles import profile
from ..runtime.latency import compare_cases
from ..runtime.session import model_file
from ..stages.compiled import Compiled
from ..stages.tolerances import ONNX
from ..store.folder import write_json
from ..system.staging import Scratch
from ..torch_backend.gather.texts import positions
from .measured import measured
from .places import onnx_place


def write_decoder(job: Compiled, folder: Path) -> dict[str, Any]:
    """Write model.onnx as a decoder with its cache, and return what the report says about it.

    Raises:
        SpaError: the model has no form that can be traced with a cache.
        ProofError: ONNX Runtime's logits differ from torch's.
    """
    _has_code(job)
    path, options = onnx_place(job, folder)
    export_decoder(job.pruned, path, **options)
    data: dict[str, Any] = {"decoder": _agreeing(decoder_parity(job.pruned, path))}
    config = genai_config(job.pruned, path) if job.layout == "uniform" else None
    data["genai"] = config is not None
    if config is None:
        job.notes.append("no genai_config.json: it has one head count for all layers, and here "
                         "layers may differ (see --layout uniform)")
    else:
        write_json(folder / "genai_config.json", config)
    times = measured(job, "latency", lambda: _latency(job, path)) if job.recipe.latency else None
    return data | (times or {})


def write_pair(job: Compiled, folder: Path) -> dict[str, Any]:
    """Write encoder.onnx and decoder.onnx, and return what the report says about them.

    Raises:
        SpaError: the model has no form that can be traced with a cache.
        ProofError: ONNX Runtime's logits differ from torch's.
    """
    _has_code(job)
    path, options = onnx_place(job, folder)
    example = dict(zip((job.pruned.main_input_name,), job.trace.args, strict=False))
    example |= job.trace.kwargs
    export_pair(job.pruned, example, path.parent, **options)
    return {"decoder": _agreeing(pair_parity(job.pruned, example, path.parent))}


def _has_code(job: Compiled) -> None:
    if job.emission == "program":
        raise SpaError("the pruned model cannot be exported as a decoder with a cache",
                       why="it is emitted as a re-written program, traced without one: "
                           + "; ".join(job.notes[-1:]),
                       fix="leave --decoder out, or prune other roles")


def _agreeing(checks: Sequence[DecoderParity]) -> list[dict[str, Any]]:
    for check in checks:
        if not check.max_rel <= ONNX.value:
            raise ProofError(f"ONNX Runtime differs from torch by {check.max_rel:.1e}",
                             where=f"{check.batch} rows, {check.tokens} tokens written",
                             fix="leave --decoder out, and please report it")
    return [check.as_dict() for check in checks]


def write_gguf_file(job: Compiled, folder: Path) -> dict[str, Any]:
    """Write model.gguf, and return what the report says about it.

    Raises:
        SpaError: llama.cpp has no graph for the model, or its rows do not fit the type.
        ProofError: the file does not hold what was written.
    """
    if job.emission == "program":
        raise SpaError("the pruned model cannot be written as GGUF",
                       why="it is emitted as a re-written program: " + "; ".join(job.notes[-1:]),
                       fix="leave --gguf out, or prune other roles")
    found = write_gguf(job.pruned, folder / "model.gguf", job.recipe.gguf, folder=folder)
    if found["tokenizer"].startswith("none"):
        job.notes.append(f"model.gguf has no tokenizer ({found['tokenizer'][6:]}): it runs on "
                         "token numbers")
    return found


def run_there(job: Compiled, folder: Path) -> dict[str, Any]:
    """Run what was written in the runtime that it is for, and return what came of it.

    A runtime that is not installed is named in the notes.

    Raises:
        ProofError: it does not load there, or writes other tokens than torch.
    """
    found = run_in(profile(job.recipe.runtime).check, folder, job.pruned,
                   exact=not job.recipe.gguf.startswith("q"))
    if found.get("missing"):
        job.notes.append(f"--for {job.recipe.runtime}: not run there, {found['missing']} is not "
                         "installed")
    return {"name": job.recipe.runtime, **found}


def _latency(job: Compiled, path: Path) -> dict[str, Any]:
    """Time prefill and decode of the dense and the pruned decoder, at batch 1 on one thread."""
    job.progress("measuring latency", 3, 4)
    with Scratch() as temporary:
        dense = temporary / "dense.onnx"
        export_decoder(job.reference, dense)
        paths = {"dense": dense, "pruned": path}
        cases = cases_of(paths, batches=(1,), length=_length(job))
        times = compare_cases(paths, {c.name: c.inputs for c in cases}, repeats=20, seconds=20.0)
    keys = {"prefill": "latency", "decode": "decode_latency"}
    return {keys[case.phase]: {
        "case": case.name, "threads": 1,
        **{n: {"median_ms": t.median, "best_ms": t.best, "cpu_median_ms": t.cpu_median}
           for n, t in times[case.name, 1].items()}} for case in cases}


def _length(job: Compiled) -> int:
    """Tokens of the prompt that is timed; one more is written after it."""
    most = positions(job.reference)
    return min(LENGTH, most - 1) if most else LENGTH


def write_int8(job: Compiled, folder: Path) -> dict[str, Any]:
    """Write model.int8.onnx from model.onnx, and return its measured difference and size.

    Measured on the first calibration batch as far as the file takes it, else on made-up inputs.

    Raises:
        SpaError: the file cannot be quantised.
    """
    path, made = model_file(folder), folder / profile(job.recipe.runtime).int8_file
    quantize(path, made, job.recipe.int8_bits)
    return {"int8": measured(job, "the difference of int8 weights",
                             lambda: _int8_difference(job, path, made))}


def _int8_difference(job: Compiled, path: Path, made: Path) -> dict[str, Any]:
    inputs = synthetic(path, Sizes(2, min(16, positions(job.reference) or 16)))
    given = _calibration_batch(job, list(inputs))
    if given:
        shape = next(iter(given.values())).shape
        inputs = synthetic(path, Sizes(shape[0], shape[-1]))
        given = {n: a for n, a in given.items() if a.shape == inputs[n].shape}
    on = job.calibration.origin if given else "made-up inputs"
    return {**difference(path, made, {**inputs, **given}), "on": on,
            "bits": job.recipe.int8_bits, "kernels": integer_kernels()}


def _calibration_batch(job: Compiled, names: list[str]) -> dict[str, np.ndarray]:
    """The first calibration batch by the names of a file's inputs, as far as it has them."""
    args, kwargs = job.calibration.batches[0] if job.calibration.batches else ((), {})
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    return {n: np.asarray(a) for n, a in found.items() if n in names and np.ndim(a) > 0}
