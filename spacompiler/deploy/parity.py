"""Compare an ONNX file with a reference, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import SpaError
from ..runtime.session import open_session, run_session
from ..stages.comparison import compare


class Parity(NamedTuple):
    """How far ONNX Runtime is from the reference on one set of inputs.

    ``max_rel`` is the largest difference over the largest absolute reference value of the same
    output: near-zero entries do not blow it up (see `comparison`).
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
        SpaError: the model does not open or run, or the outputs' number, shapes,
            types or NaNs differ.
    """
    session = open_session(Path(path), threads=threads)
    found = []
    for inputs in input_sets:
        gap = compare(run_session(session, inputs), list(reference(inputs)))
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        if gap.why:
            raise SpaError("the ONNX model and the reference cannot be compared", why=gap.why,
                           where=", ".join(f"{n} {s}" for n, s in shapes.items()),
                           fix="let the reference return the program's tensors in its order")
        found.append(Parity(shapes, gap.absolute, gap.relative))
    return found
