"""Compare ONNX files in ONNX Runtime: `spacompiler bench`.

Inputs are made up from what the files declare, so that any file can be timed: the first axis is
the batch, further free axes are the length (or, by their names, the past or the total length).
A file with a key/value cache is timed twice: reading a prompt (prefill) and writing one token.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from .artifact_path import check_artifact
from .emit.latency import Arrays, Latency, compare_cases, ratio
from .errors import SpaError, UsageError
from .runtime import cache_names

LENGTH = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the free axes."""

    batch: int
    sequence: int
    past: int = 0


@dataclass(frozen=True)
class Case:
    """What is timed: `phase` is prefill, decode or whole; `inputs` of each file by its name."""

    name: str
    phase: str
    sizes: Sizes
    inputs: Mapping[str, Arrays]


def declared(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int | str, ...]]]:
    """Return type and shape of each input of a file, without reading its weights.

    Raises:
        SpaError: the file is missing or damaged, or an input is no tensor of known rank.
    """
    try:
        graph = ir.load(path).graph
        weights = set(graph.initializers)
        return {str(v.name): (v.dtype.numpy(), tuple(  # type: ignore[union-attr]
            d if isinstance(d, int) else str(d.value) for d in v.shape))  # type: ignore[union-attr]
                for v in graph.inputs if v.name not in weights}
    except Exception as problem:  # protobuf and onnx_ir raise their own kinds
        raise SpaError("the ONNX file cannot be read", where=str(path), why=str(problem),
                       fix="give a complete .onnx file whose inputs are tensors") from problem


def synthetic(path: Path, sizes: Sizes) -> dict[str, np.ndarray]:
    """Return made-up inputs of a file: normal numbers, masks of ones, positions, token 0."""
    generator = np.random.default_rng(0)
    made = {}
    for name, (dtype, shape) in declared(path).items():
        concrete = tuple(_size(name, axis, d, sizes) for axis, d in enumerate(shape))
        if np.issubdtype(dtype, np.floating):
            value = generator.standard_normal(concrete)
        elif "position" in name and len(concrete) > 1:
            value = np.broadcast_to(np.arange(sizes.past, sizes.past + concrete[-1]), concrete)
        else:
            value = np.full(concrete, int("mask" in name or dtype == np.bool_))
        made[name] = np.ascontiguousarray(value, dtype=dtype)
    return made


def _size(name: str, axis: int, symbol: int | str, sizes: Sizes) -> int:
    """The size of an axis: its own if it is fixed, else by where it stands and what it is called.
    """
    if isinstance(symbol, int):
        return symbol
    if axis == 0:
        return sizes.batch
    if "+" in symbol or "total" in symbol or name == "attention_mask":
        return sizes.past + sizes.sequence
    return sizes.past if "past" in symbol else sizes.sequence


def cases(paths: Mapping[str, Path], *, batches: Sequence[int] = (1, 8),
          length: int = LENGTH) -> list[Case]:
    """Return what to time for some files, which must be alike: all with a cache, or none.

    Files with a fixed batch are timed at that one.

    Raises:
        UsageError: files with and without a cache, or with different fixed batches.
    """
    inputs = [declared(path) for path in paths.values()]
    cached = {bool(cache_names(found)) for found in inputs}
    if len(cached) > 1:
        raise UsageError("a decoder with a cache cannot be compared with a file that has none",
                         fix="export both with --decoder, or both without")
    shapes = [shape for found in inputs for _, shape in found.values() if shape]
    fixed = sorted({shape[0] for shape in shapes if isinstance(shape[0], int)})
    if len(fixed) > 1:
        raise UsageError("the files have different fixed batch sizes", why=str(fixed),
                         fix="export them with a free batch axis")
    free = any(isinstance(d, str) for shape in shapes for d in shape[1:])
    return [Case(name, phase, sizes, {n: synthetic(p, sizes) for n, p in paths.items()})
            for batch in fixed or batches
            for phase, name, sizes in _phases(batch, length, cached == {True}, free)]


def _phases(batch: int, length: int, cached: bool, free: bool) -> list[tuple[str, str, Sizes]]:
    """The phases of one batch size, with their names."""
    if not cached:
        name = f"batch {batch}" + (f" × {length}" if free else "")
        return [("whole", name, Sizes(batch, length))]
    return [("prefill", f"prefill {batch} × {length}", Sizes(batch, length)),
            ("decode", f"decode {batch} × 1 after {length}", Sizes(batch, 1, length))]


def run(path: Path, other: Path | None = None, *, batches: Sequence[int] = (1, 8),
        threads: Sequence[int] = (1, 2), length: int = LENGTH, repeats: int = 20,
        seconds: float = 20.0) -> list[dict[str, Any]]:
    """Time one file, two, or an artifact against the dense model that it was made from.

    Args:
        path: an ONNX file, or a directory that `compile` wrote. A directory alone is compared with
            the dense model of its recipe, exported anew.
        other: what to compare with `path`, again a file or a directory.
        batches, threads, length: sizes and numbers of threads to try.
        repeats, seconds: turns of each case, and when to stop earlier (after five turns).

    Returns:
        One row a case and number of threads: median, best and CPU times in milliseconds of each
        model, and the ratios of the others to the first with their quartiles.

    Raises:
        UsageError, SpaError: nothing to compare, or a file that does not run.
    """
    with _contenders(path, other) as paths:
        found = cases(paths, batches=batches, length=length)
        times = compare_cases(paths, {c.name: c.inputs for c in found}, threads=threads,
                              repeats=repeats, seconds=seconds)
    return [_row(case, count, times[case.name, count]) for case in found for count in threads]


def _row(case: Case, threads: int, times: Mapping[str, Latency]) -> dict[str, Any]:
    first = next(iter(times.values()))
    models = {name: {"median_ms": t.median, "best_ms": t.best, "cpu_median_ms": t.cpu_median,
                     "cpu_best_ms": t.cpu_best, "repeats": t.repeats}
              for name, t in times.items()}
    ratios = {name: {"wall": ratio(t, first)._asdict(), "cpu": ratio(t, first, cpu=True)._asdict()}
              for name, t in list(times.items())[1:]}
    return {"case": case.name, "phase": case.phase, "batch": case.sizes.batch, "threads": threads,
            "models": models, "ratios": ratios}


def table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a table: medians in milliseconds, and ratios with their quartiles."""
    from .report_tables import table as make

    names = list(rows[0]["models"])
    head = ["case", "threads", *(f"{n}, ms" for n in names),
            *(f"{n} / {names[0]}, {kind}" for n in names[1:] for kind in ("wall", "CPU"))]
    cells = [[row["case"], str(row["threads"]),
              *(f"{row['models'][n]['median_ms']:.2f}" for n in names),
              *(_spread(row["ratios"][n][kind]) for n in names[1:] for kind in ("wall", "cpu"))]
             for row in rows]
    return make(head, cells)


def _spread(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


@contextmanager
def _contenders(path: Path, other: Path | None) -> Iterator[dict[str, Path]]:
    """The files to compare by name, the one that the others are measured against first."""
    if other is not None:
        names = [str(path), str(other)]
        yield dict(zip(names, (_file(path), _file(other)), strict=True))
    elif path.is_dir():
        with tempfile.TemporaryDirectory(prefix="spacompiler-") as folder:
            extra = {"int8": path / "model.int8.onnx"}
            yield {"dense": dense_file(path, Path(folder)), "pruned": _file(path),
                   **{n: p for n, p in extra.items() if p.exists()}}
    else:
        yield {str(path): _file(path)}


def _file(path: Path) -> Path:
    file = path / "model.onnx" if path.is_dir() else path
    if not file.exists():
        raise UsageError(f"there is no ONNX file at {str(file)!r}",
                         fix="give an .onnx file, or a directory that was compiled with ONNX")
    return file


def dense_file(artifact: Path, folder: Path) -> Path:
    """Export the dense model of an artifact's recipe to a folder, as its model.onnx was.

    Raises:
        SpaError: the recipe names no model that can be loaded again.
    """
    check_artifact(artifact)
    from .artifact import read_json
    from .emit.decoder import export_decoder
    from .emit.onnx_file import export_onnx
    from .frontends.torch_export import trace
    from .loading import check_inputs
    from .source import load

    name = read_json(artifact / "recipe.json")["model"]
    if name.endswith(".onnx"):
        return _file(Path(name))
    try:
        module = load(name).module
    except SpaError as problem:
        raise SpaError(f"the dense model {name!r} cannot be loaded", why=str(problem.what),
                       fix="give it as an ONNX file: spacompiler bench DENSE.onnx DIR") from problem
    made = folder / "dense.onnx"
    if cache_names(declared(_file(artifact))):
        export_decoder(module, made)
        return made
    traced = trace(module, check_inputs(artifact, read_json(artifact / "structure.json")))
    from .write import axis_names

    export_onnx(traced.exported, made, input_names=traced.graph.inputs, axes=axis_names(traced))
    return made
