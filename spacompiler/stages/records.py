"""A compile under way, and the steps of it that depend on where the model lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import nn

from ..axes.choices import Choices
from ..evidence.calibration import Calibration
from ..evidence.calls import Inputs
from ..evidence.losses import default_loss
from ..groups.solution import Group, Solution
from ..plan.plan import Plan
from ..request.recipe import Recipe
from .proof import Proof


@dataclass(frozen=True, slots=True)
class Dropped:
    """Blocks that went, by their paths in the dense network, and what the check of that gave.

    `error` is between the shorter network and the dense one with these blocks bypassed; `control`
    the same with `bypassed` besides, a block that stays.
    """

    paths: tuple[str, ...]
    error: float
    control: float
    bypassed: str = ""


class Schedule(Protocol):
    """Decide what goes while training: masks grow, and what was learned is folded in."""

    name: ClassVar[str]

    def run(self, job: Job, allocate: Callable[[], dict[str, int]]) -> None:
        """Train the job's module in place and set its `candidates`, `counts` and `scores`.

        `allocate()` returns counts for the job's candidates by the target and the allocation.
        """


Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """A compile under way; later fields are filled by later steps.

    `module` is a torch module, or what another front end reads: then it brings its `backend`. Where
    whole blocks were dropped it is the network without them; `dense` is the one with them, and
    `whole` are its costs by metric (and bytes). `idle` says that repair changed nothing.
    `backend` carries out what depends on where the model lives; `source` is what is known of where
    the module comes from, and `folder` where its files lie.
    `given` is the user's own module, with which the result shares no memory (None: the compile may
    use it up).
    """

    recipe: Recipe
    module: nn.Module
    inputs: Inputs
    importance: Any
    allocation: Any
    calibration: Calibration
    backend: Backend
    loss: Any = default_loss
    name: str = ""
    tokenizer: Any = None
    progress: Progress = lambda stage, done, total: None
    trace: Any = None
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
    adapters: tuple[Any, ...] = ()
    kept: Any = None
    source: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    given: Any = None
    parts: tuple[str, ...] = ()

    @property
    def reference(self) -> Any:
        """The dense network, with all of its blocks."""
        return self.module if self.dense is None else self.dense


@dataclass(frozen=True)
class Backend:
    """The steps of a compile that depend on where the model lives: mostly functions of the job.

    `trace(module, inputs, quick=False)` returns a trace (with its `graph`) and its solution; a
    quick one serves groups and slicing only. `context` is what importance
    passes see, `digest` the hash of the dense weights, `prove` the proof; `emit` sets `pruned`,
    `layout` and `emission`; `add_biases` gives `module` zero biases where consumers lack one (False
    if none does). `kind` says what a model is: a torch module, or an ONNX file.
    """

    kind: Literal["torch", "onnx"]
    check_weights: Callable[[Job], None]
    trace: Callable[..., tuple[Any, Solution]]
    context: Callable[[Job], Any]
    digest: Callable[[Job], str]
    prove: Callable[[Job], Proof]
    emit: Callable[[Job], None]
    add_biases: Callable[[Job], bool]
