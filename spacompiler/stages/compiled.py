"""All records of a compile, and views of them under the names that `result.job` has had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..axes.choices import Choices
from ..errors import SpaError
from ..evidence.calibration import Calibration
from ..evidence.calls import Inputs
from ..groups.solution import Group, Solution
from ..plan.plan import Plan
from ..plan.problem import Allocation
from ..request.recipe import Recipe
from .backend import Backend
from .proof import Proof
from .records import Decided, Dropped, Emitted, Progress, Request, Scored, Subject, Traced


@dataclass(frozen=True)
class Compiled:
    """All records of a compile; after a dry run nothing is proved or emitted.

    `now` and `last` are the latest subject and decision: emission may change both.
    """

    ask: Request
    subject: Subject
    traced: Traced
    scored: Scored
    decided: Decided
    proof: Proof | None = None
    emitted: Emitted | None = None

    @property
    def now(self) -> Subject:
        """What the compile is about: after emission parts are the whole again."""
        return self.subject if self.emitted is None else self.emitted.subject

    @property
    def last(self) -> Decided:
        """The decision, of the program that was emitted."""
        return self.decided if self.emitted is None else self.emitted.decided

    @property
    def made(self) -> Emitted:
        """What was emitted; raises SpaError after a dry run."""
        if self.emitted is None:
            raise SpaError("nothing was made", where=self.ask.name, why="it was a dry run",
                           fix="compile without dry_run")
        return self.emitted

    @property
    def recipe(self) -> Recipe:
        """What was asked for; parts of a network have no ONNX file."""
        if self.emitted is not None and self.subject.parts:
            return self.ask.recipe.unexported()
        return self.ask.recipe

    @property
    def name(self) -> str:
        """What the report calls the model."""
        return self.ask.name

    @property
    def allocation(self) -> Allocation:
        """The pass that allocated."""
        return self.ask.allocation

    @property
    def calibration(self) -> Calibration:
        """The data that was looked at."""
        return self.ask.calibration

    @property
    def compensation(self) -> Any:
        """The pass that repaired, or None."""
        return self.ask.compensation

    @property
    def recovery(self) -> Any:
        """The pass that trained, or None."""
        return self.ask.recovery

    @property
    def loss(self) -> Callable[..., torch.Tensor]:
        """The loss of calibration and training."""
        return self.ask.loss

    @property
    def tokenizer(self) -> Any:
        """What turns text into tokens, or None."""
        return self.ask.tokenizer

    @property
    def notes(self) -> list[str]:
        """What there is to tell the user."""
        return self.ask.notes

    @property
    def progress(self) -> Progress:
        """Says how far the work has come."""
        return self.ask.tell

    @property
    def inputs(self) -> Inputs:
        """Example inputs."""
        return self.now.inputs

    @property
    def backend(self) -> Backend:
        """What carries out a compile of this kind of model."""
        return self.now.backend

    @property
    def source(self) -> Mapping[str, Any]:
        """What is known of where the model comes from."""
        return self.now.source

    @property
    def folder(self) -> Path | None:
        """Where its files lie."""
        return self.now.folder

    @property
    def dense(self) -> Any:
        """The network with all blocks, where some were dropped."""
        return self.now.dense

    @property
    def dropped(self) -> Dropped | None:
        """Blocks that went."""
        return self.now.dropped

    @property
    def whole(self) -> Mapping[str, int]:
        """Costs of the network with all blocks."""
        return self.now.whole

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the parts that were entered."""
        return self.now.parts

    @property
    def arrays(self) -> frozenset[str]:
        """Names of the arrays of the user's own."""
        return self.now.arrays

    @property
    def base_hash(self) -> str:
        """Hash of the weights before an adapter was merged."""
        return self.now.base_hash

    @property
    def reference(self) -> Any:
        """The dense network, with all of its blocks."""
        return self.now.reference

    @property
    def module(self) -> Any:
        """The dense network, without blocks that went."""
        return self.now.model

    @property
    def importance(self) -> Any:
        """The pass that scored."""
        return self.scored.importance

    @property
    def candidates(self) -> tuple[Group, ...]:
        """Groups that might shrink."""
        return self.scored.candidates

    @property
    def scores(self) -> Mapping[str, np.ndarray]:
        """Scores by group."""
        return self.scored.scores

    @property
    def counts(self) -> Mapping[str, int]:
        """Slices that stay by group, where a schedule set them."""
        return self.scored.counts

    @property
    def trace(self) -> Any:
        """The traced program."""
        return self.last.trace

    @property
    def solution(self) -> Solution:
        """Its solved axes."""
        return self.last.solution

    @property
    def plan(self) -> Plan:
        """What stays."""
        return self.last.plan

    @property
    def choices(self) -> Choices:
        """What stays, by atom."""
        return self.last.choices

    @property
    def stock(self) -> str:
        """In which layout a configuration of transformers may express it: "" in none."""
        return self.last.stock

    @property
    def idle(self) -> bool:
        """Whether a repair was asked for and changed nothing."""
        return self.last.idle

    @property
    def pruned(self) -> Any:
        """The pruned model."""
        return self.emitted.model if self.emitted is not None else None

    @property
    def layout(self) -> str:
        """How it is laid out: uniform, per-layer, any or onnx."""
        return self.emitted.layout if self.emitted is not None else ""

    @property
    def emission(self) -> str:
        """How it was made: module, program or graph."""
        return self.emitted.emission if self.emitted is not None else ""

    @property
    def quality(self) -> Mapping[str, Any] | None:
        """How dense and pruned compare on data."""
        return self.emitted.quality if self.emitted is not None else None

    @property
    def kept(self) -> Any:
        """An adapter cut to its size."""
        return self.emitted.kept if self.emitted is not None else None

    @property
    def trained(self) -> Mapping[str, Any] | None:
        """What a recovery reports."""
        return self.emitted.trained if self.emitted is not None else None
