"""A compile under way, and the steps of it that depend on where the model lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .blocks import Dropped
from .calibration import Calibration, default_loss
from .choices import Choices
from .frontends.torch_export import Inputs, Trace
from .groups import Group, Solution
from .plan import Plan
from .proof import Proof
from .recipe import Recipe

Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """A compile under way; later fields are filled by later steps.

    `module` is a torch module, or what another front end reads: then it brings its `backend`. Where
    whole blocks were dropped it is the network without them; `dense` is the one with them, and
    `whole` are its costs by metric (and bytes). `idle` says that repair changed nothing.
    `source` is what is known of where the module comes from, and `folder` where its files lie.
    """

    recipe: Recipe
    module: nn.Module
    inputs: Inputs
    importance: Any
    allocation: Any
    calibration: Calibration
    loss: Any = default_loss
    name: str = ""
    tokenizer: Any = None
    progress: Progress = lambda stage, done, total: None
    trace: Trace = None  # type: ignore[assignment]
    solution: Solution = None  # type: ignore[assignment]
    candidates: list[Group] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    compensation: Any = None
    must_repair: bool = True
    idle: bool = False
    context: Any = None
    plan: Plan = None  # type: ignore[assignment]
    choices: Choices = field(default_factory=dict)
    proof: Proof | None = None
    pruned: Any = None
    program: Any = None
    layout: str = ""
    emission: str = ""
    notes: list[str] = field(default_factory=list)
    obstacles: tuple[str, ...] = ()
    whole_inputs: Any = None
    uniform: bool = False
    biased: bool = False
    arrays: frozenset[str] = frozenset()
    owned: bool = False
    dense: Any = None
    dropped: Dropped | None = None
    whole: dict[str, int] = field(default_factory=dict)
    recovery: Any = None
    recover_data: Calibration | None = None
    checkpoint: Path | None = None
    trained: dict[str, Any] | None = None
    schedule: Any = None
    counts: dict[str, int] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    base_hash: str = ""
    kept: Any = None
    source: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def reference(self) -> Any:
        """The dense network, with all of its blocks."""
        return self.module if self.dense is None else self.dense

    @property
    def backend(self) -> Backend:
        """What carries out the steps that depend on where the model lives."""
        return backend_of(self.module)


@dataclass(frozen=True)
class Backend:
    """The steps of a compile that depend on where the model lives: mostly functions of the job.

    `trace(module, inputs, quick=False)` returns a trace (with its `graph`) and its solution; a
    quick one serves groups and slicing only. `context` is what importance
    passes see, `digest` the hash of the dense weights, `prove` the proof; `emit` sets `pruned`,
    `layout` and `emission`; `repair` changes the traced arrays and returns notes; `write` fills
    the artifact's folder and adds to the report's data.
    """

    check_weights: Callable[[Job], None]
    trace: Callable[..., tuple[Any, Solution]]
    context: Callable[[Job], Any]
    digest: Callable[[Job], str]
    prove: Callable[[Job], Proof]
    emit: Callable[[Job], None]
    write: Callable[[Job, Path, dict[str, Any]], None]
    repair: Callable[[Job], list[str]] | None = None


def backend_of(module: Any) -> Backend:
    """Return the backend that a front end put on what it read, or torch's."""
    from .torch_backend import TORCH

    found = getattr(module, "backend", None)
    return found if isinstance(found, Backend) else TORCH
