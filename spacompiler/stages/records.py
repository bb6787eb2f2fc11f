"""What each step of a compile hands to the next: frozen records, each made by one step.

A request says what is wanted; a subject is the model that it is about; then come what was traced,
scored, decided, repaired and emitted. `compiled.Compiled` holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from ..axes.choices import Choices
from ..evidence.calibration import Calibration
from ..evidence.calls import Inputs
from ..evidence.losses import default_loss
from ..evidence.where import HERE, Where
from ..groups.solution import Group, Solution
from ..plan.plan import Plan
from ..plan.problem import Allocation, Problem
from ..request.recipe import Recipe
from ..store.room import Room
from ..store.work import Work
from .backend import Backend

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What is wanted: a recipe, the passes that it names, and the data.

    `compensation`, `schedule` and `recovery` are None where nothing is repaired or trained. In
    `place` finished steps are kept, as `work` once it is known what the compile is of. `model` is
    what finds the model again, "" where only the user has it; `where` is the device that computes.
    `notes` is what the steps have to tell the user, in their order; it only grows.
    """

    recipe: Recipe
    importance: Any
    allocation: Allocation
    calibration: Calibration
    compensation: Any = None
    must_repair: bool = True
    schedule: Any = None
    recovery: Any = None
    recover_data: Calibration | None = None
    checkpoint: Path | None = None
    place: Path | None = None
    work: Work | None = None
    loss: Callable[..., torch.Tensor] = default_loss
    tokenizer: Any = None
    name: str = ""
    model: str = ""
    where: Where = HERE
    tell: Progress = lambda stage, done, total: None
    notes: list[str] = field(default_factory=list)

    @property
    def asked(self) -> dict[str, Any]:
        """What the recipe says of groups that may go."""
        r = self.recipe
        return {"roles": r.roles, "only": r.only, "ignore": r.ignore, "approximate": r.approximate}


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


@dataclass(frozen=True, slots=True)
class Factored:
    """Layers that became products of two, by path, with their ranks, and what the check gave.

    `error` is between the network and the dense one with each weight at its product; `control` the
    same with two directions of the layer `swapped` exchanged.
    """

    ranks: Mapping[str, int]
    error: float
    control: float
    swapped: str = ""

    @property
    def held(self) -> frozenset[str]:
        """Names of the groups that are ranks: they have their own budget."""
        return frozenset(f"{path}.0.weight:0" for path in self.ranks)


@dataclass(frozen=True)
class Subject:
    """The model that a compile is about, as far as it has come.

    `model` is a torch module or an ONNX file, `backend` what carries out a compile of its kind.
    Where whole blocks were dropped it is the network without them, `dense` the one with them and
    `whole` the costs of that by metric (and bytes). Where parts were entered it is those, and
    `whole_inputs` are the network's. `arrays` are the names of the user's own, `biased` says that
    biases were added. `owned` models may be changed; `given` is the user's, with which the result
    shares no memory. `base` are arrays as they were before adapters were merged. `source` is what
    is known of where it comes from, and `folder` where its files lie; `sound` says that its arrays
    were found finite as they were read. Where a `room` is given, the result's large arrays lie
    there until they are written.
    """

    model: Any
    inputs: Inputs
    backend: Backend
    owned: bool = False
    given: Any = None
    source: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sound: bool = False
    room: Room | None = None
    dense: Any = None
    dropped: Dropped | None = None
    factored: Factored | None = None
    whole: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    whole_inputs: Any = None
    biased: bool = False
    arrays: frozenset[str] = frozenset()
    adapters: tuple[Any, ...] = ()
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)
    base_hash: str = ""

    @property
    def reduced(self) -> bool:
        """True if something went before widths: blocks, or ranks of layers."""
        return self.dropped is not None or self.factored is not None

    @property
    def reference(self) -> Any:
        """The dense network, with all of its blocks and layers."""
        return self.model if self.dense is None else self.dense


@dataclass(frozen=True)
class Traced:
    """A traced program, its solved axes, and the groups that may shrink."""

    trace: Any
    solution: Solution
    candidates: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Scores of groups by name, (*outer slices, slices) each; counts where a schedule set them,
    and in which layout a configuration of transformers may express them.

    `context` still holds the statistics that were gathered. `importance` is the pass that scored.
    """

    importance: Any
    candidates: tuple[Group, ...] = ()
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    stock: str = ""
    context: Any = None


@dataclass(frozen=True)
class Decided:
    """What stays of a traced program: a plan, and its choices by atom.

    `stock` says in which layout a configuration of transformers may express it ("uniform",
    "per-layer", "" in none); `idle` that a repair was asked for and changed nothing. `cut` are
    arrays, by name, that the proof or one way of making the model cut: the next one need not. Large
    ones lie in a `room` where there is one.
    """

    trace: Any
    solution: Solution
    plan: Plan
    choices: Choices
    stock: str = ""
    idle: bool = False
    cut: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    room: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Emitted:
    """The pruned model: how it was made, for what, and what was done to it since.

    `program` is its re-written program where it is emitted as one. `kept` is an adapter cut to its
    size, `trained` what a recovery reports, `quality` how it compares with the dense model.
    """

    model: Any
    layout: str
    emission: str
    decided: Decided
    subject: Subject
    program: Any = None
    kept: Any = None
    trained: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Scheduling:
    """What a schedule is given: a module that it may train, data, and how counts are allocated.

    `allocate(candidates, scores)` returns counts by the target and the allocation pass, and in
    which layout a configuration of transformers may express them ("" in none);
    `problems(candidates, scores)`, for those that decide counts themselves, the units, legal counts
    and cost to meet of each layout that may do, and which it is. `context` holds statistics of the
    dense network that are at hand, `scores` those of the pass's own criterion.
    """

    module: Any
    trace: Any
    solution: Solution
    candidates: tuple[Group, ...]
    calibration: Calibration
    loss: Callable[..., torch.Tensor]
    allocate: Callable[[Sequence[Group], Mapping[str, np.ndarray]], tuple[dict[str, int], str]]
    problems: Callable[[Sequence[Group], Mapping[str, np.ndarray]], list[tuple[Problem, str]]]
    seed: int = 0
    name: str = ""
    tell: Progress = lambda stage, done, total: None
    notes: list[str] = field(default_factory=list)
    context: Any = None
    scores: Mapping[str, Any] = field(default_factory=dict)


class Schedule(Protocol):
    """Decide what goes while training: masks grow, and what was learned is folded in.

    A schedule may have a method more: `after(task, choices)`, called once the program is repaired,
    may change its arrays again.
    """

    name: ClassVar[str]

    def run(self, task: Scheduling) -> Scored:
        """Train the task's module in place; return what may go, with scores and counts."""
