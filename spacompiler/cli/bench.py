"""Compare ONNX files in ONNX Runtime: `spacompiler bench`.

Inputs are made up from what the files declare, so that any file can be timed: the first axis is
the batch, further free axes are the length (or, by their names, the past or the total length).
A file with a key/value cache is timed twice: reading a prompt (prefill) and writing one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..deploy.cases import LENGTH, Case, cases, declared
from ..errors import UsageError
from ..runtime.decoder import cache_names
from ..runtime.latency import Latency, compare_cases, ratio
from ..runtime.session import model_file
from ..store.place import MANIFEST, check_artifact
from ..system.staging import Scratch, orderly


def run(path: Path, other: Path | None = None, *, batches: Sequence[int] = (1, 8),
        threads: Sequence[int] = (1, 2), length: int = LENGTH, repeats: int = 20,
        seconds: float = 20.0, source: str | None = None) -> list[dict[str, Any]]:
    """Time one file, two, or an artifact against the dense model that it was made from.

    Args:
        path: an ONNX file, or a directory that `compile` wrote. A directory alone is compared with
            the dense model of its recipe, exported anew.
        other: what to compare with `path`, again a file or a directory.
        batches, threads, length: sizes and numbers of threads to try.
        source: the dense model, where an artifact alone is given and its record is not of the zoo.
        repeats, seconds: turns of each case, and when to stop earlier (after five turns).

    Returns:
        One row a case and number of threads: median, best and CPU times in milliseconds of each
        model, and the ratios of the others to the first with their quartiles.

    Raises:
        UsageError, SpaError: nothing to compare, or a file that does not run.
    """
    with _contenders(path, other, source) as paths:
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
    from .tables import table as make

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
def _contenders(path: Path, other: Path | None,
                source: str | None = None) -> Iterator[dict[str, Path]]:
    """The files to compare by name, the one that the others are measured against first."""
    if other is not None:
        names = [str(path), str(other)]
        yield dict(zip(names, (_file(path), _file(other)), strict=True))
    elif path.is_dir():
        check_artifact(path)
        with orderly(), Scratch() as folder:
            extra = {"int8": path / "model.int8.onnx"}
            yield {"dense": dense_file(path, folder, source), "pruned": _file(path),
                   **{n: p for n, p in extra.items() if p.exists()}}
    else:
        yield {str(path): _file(path)}


def _file(path: Path) -> Path:
    if (path / MANIFEST).exists():
        from ..store.folder import check_hashes

        check_hashes(path)
    file = model_file(path)
    if not file.exists():
        raise UsageError(f"there is no ONNX file at {str(file)!r}",
                         fix="give an .onnx file, or a directory that was compiled with ONNX")
    return file


def dense_file(artifact: Path, folder: Path, source: str | None = None) -> Path:
    """Export the dense model of an artifact to a folder, as its model.onnx was.

    `source` names it; what the artifact records is followed to the zoo only.

    Raises:
        SpaError: the artifact is damaged, or it is not known what its dense model is.
    """
    from ..artifact.load import check_inputs, dense_source
    from ..deploy.decoder import export_decoder
    from ..deploy.export import export_onnx
    from ..store.folder import check_hashes, read_json
    from ..torch_backend.read.export import trace

    check_hashes(artifact)
    structure = read_json(artifact / "structure.json")
    if source is not None and source.endswith(".onnx"):
        return _file(Path(source))
    module = dense_source(structure, source)
    made = folder / "dense.onnx"
    if cache_names(declared(_file(artifact))):
        export_decoder(module, made)
        return made
    traced = trace(module, check_inputs(artifact, structure))
    from ..deploy.inputs import axis_names

    export_onnx(traced.exported, made, input_names=traced.graph.inputs, axes=axis_names(traced))
    return made
