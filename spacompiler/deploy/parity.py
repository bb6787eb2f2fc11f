"""Compare an ONNX file with a reference, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import SpaError
from ..runtime.session import open_session, run_session


class Parity(NamedTuple):
    """How far ONNX Runtime is from the reference on one set of inputs.

    ``max_rel`` is the largest difference over the largest absolute reference value of the same
    output: near-zero entries do not blow it up. Values that are not finite and differ give inf.
    """

    shapes: dict[str, tuple[int, ...]]
    max_abs: float
    max_rel: float


def parity(
    path: Path,
    reference: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]],
    input_sets: Iterable[Mapping[str, np.ndarray]],
    *,
    threads: int = 1,
) -> list[Parity]:
    """Compare a file with a reference on several sets of inputs, one session for all of them.

    Use sizes other than the traced ones: a model that was fixed to them by mistake fails there.

    Raises:
        SpaError: the model does not open or run, or the outputs' number or shapes differ.
    """
    session = open_session(Path(path), threads=threads)
    found = []
    for inputs in input_sets:
        pairs = _pair(run_session(session, inputs), reference(inputs))
        gaps = [_gap(mine, theirs) for mine, theirs in pairs]
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        found.append(Parity(shapes, max(g[0] for g in gaps), max(g[1] for g in gaps)))
    return found


def _pair(
    mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Match outputs with the reference's by position."""
    shapes = [np.shape(a) for a in mine], [np.shape(a) for a in theirs]
    if not shapes[0] or shapes[0] != shapes[1]:
        raise SpaError(
            what="the ONNX model and the reference return different shapes",
            why=f"ONNX {shapes[0]}, reference {shapes[1]}",
            fix="let the reference return the program's tensors in its order",
        )
    return [(np.asarray(a), np.asarray(b)) for a, b in zip(mine, theirs, strict=True)]


def _gap(mine: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Largest difference, absolute and relative to the reference's largest value."""
    if not theirs.size:
        return 0.0, 0.0
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = np.where(same, 0.0, np.abs(a - b))
    worst = float(np.max(np.where(np.isfinite(gap), gap, np.inf)))
    scale = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
    return worst, worst / scale if scale else (0.0 if worst == 0 else float("inf"))
