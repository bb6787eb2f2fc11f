"""The steps of a compile for an ONNX file: nothing of the framework that made it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from .emit import onnx_proof
from .emit.onnx_rewrite import rewrite
from .errors import SpaError, UsageError
from .frontends.onnx_file import OnnxFile, checked_feed
from .frontends.onnx_lower import OnnxTrace, trace
from .frontends.onnx_ops import TABLE
from .groups import Group, Member, Solution, solve
from .pipeline import Backend, Job
from .scores import rows


def analyse(file: OnnxFile, inputs: Any) -> tuple[OnnxTrace, Solution]:
    """Lower the file at the sizes of the example inputs (or guessed ones) and solve its axes."""
    feeds = None
    if inputs:
        given = inputs if isinstance(inputs, dict) else dict(
            zip([v.name or "" for v in file.inputs()], inputs, strict=False))
        feeds = checked_feed(file, given)
    traced = trace(file, feeds)
    return traced, solve(traced.graph, TABLE)


def check_weights(job: Job) -> None:
    """Raise SpaError if a stored array is not finite."""
    file: Any = job.module
    job.notes.extend(file.notes)
    for name, value in file.model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not _sound(tensor.numpy()):
            raise SpaError(f"weight {name} holds NaN or infinity", where=job.name,
                           fix="use a model with finite weights")


def _sound(array: np.ndarray) -> bool:
    """True if all is finite, or nothing but zeros and infinities (a mask, a bound)."""
    array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    finite = np.isfinite(array)
    return bool(finite.all() or (not np.isnan(array).any() and not array[finite].any()))


class FileScores:
    """The context that importance passes see: stored arrays of a file."""

    def __init__(self, job: Job) -> None:
        self.trace: OnnxTrace = job.trace  # type: ignore[assignment]
        self.solution, self.seed = job.solution, job.recipe.seed

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array by its name."""
        return _tensor(self.trace.stored(name))

    def rows(self, member: Member, group: Group) -> torch.Tensor:
        """Return a stored array as (*group.shape, rest)."""
        return rows(self.stored(member.weight), self.solution.dims(member.weight),
                    member.dim, group)

    def calibrate(self, needs: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse what needs gradients."""
        raise UsageError(
            f"an ONNX file has no gradients: {', '.join(needs)} cannot be gathered",
            why="ONNX Runtime computes forward only",
            fix="use --importance magnitude or random")


def _tensor(array: np.ndarray) -> torch.Tensor:
    if not array.flags.writeable or array.dtype.name in ("bfloat16",):
        array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot know that nobody writes
        return torch.from_numpy(array)


def emit(job: Job) -> None:
    """Make the pruned model; its arrays are sliced when they are written."""
    job.pruned = rewrite(cast(Any, job.trace), job.solution, job.choices)
    job.layout, job.emission = "onnx", "graph"


def write(job: Job, folder: Path, data: dict[str, Any]) -> None:
    """Write model.onnx and what `verify` needs; the file is checked and run as it lies there."""
    from .emit.onnx_write import write_file

    write_file(job, folder, data)


BACKEND = Backend(
    check_weights=check_weights, trace=analyse, context=FileScores,
    digest=lambda job: cast(Any, job.module).digest,
    prove=lambda job: onnx_proof.prove(
        cast(Any, job.trace), job.solution, job.choices, seed=job.recipe.seed),
    emit=emit, write=write)
