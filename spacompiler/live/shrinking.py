"""A module that shrinks in place, step by step, each step proved or undone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from spacompiler.axes.choices import Choices
from spacompiler.errors import ProofError, SpaError
from spacompiler.evidence.calls import Inputs
from spacompiler.groups.solution import solve
from spacompiler.live.kept import Kept
from spacompiler.live.shrunk import shrunk
from spacompiler.live.surgery import Undo, operate_in_place
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.proof import Proof
from spacompiler.stages.tolerances import LIVE_BFLOAT16, LIVE_FLOAT16, LIVE_FLOAT32, LIVE_FLOAT64
from spacompiler.torch_backend.emit.attributes import Seen, assign, resized, unmet, watch
from spacompiler.torch_backend.prove import masked_dense, prove
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.weights import named_arrays, runs_like

TOLERANCES = {torch.float64: LIVE_FLOAT64, torch.float32: LIVE_FLOAT32,
              torch.float16: LIVE_FLOAT16, torch.bfloat16: LIVE_BFLOAT16}


class Shrinking:
    """A live module with its trace and solution, dense and as it is now.

    `kept` says, in the dense model's coordinates, what is still there. `attributes` are all that
    were set, by (module path, name). Raises SpaError if the module cannot be traced.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, *, check: bool = True,
                 seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            self.trace = self.dense_trace = trace(model, inputs)
            self._seen = self._watched(model) if check else Seen()
        self.model, self._check, self._seed = model, check, seed
        self.solution = self.dense = solve(self.trace.graph, TABLE)
        self.kept = Kept(self.dense, {})
        self.attributes: dict[tuple[str, str], Any] = {}
        self.proof: Proof | None = None

    def _watched(self, model: nn.Module) -> Seen:
        """Sizes that the dense module's own code reads; empty if they cannot be watched."""
        for distinct in (True, False):
            try:
                return watch(model, self.trace.args, self.trace.kwargs, distinct=distinct)
            except (SpaError, RuntimeError, TypeError):  # one that can't be copied, or refuses
                continue
        return Seen()

    def to(self, later: Kept, optimizers: Iterable[torch.optim.Optimizer] = ()) -> bool:
        """Shrink to what is kept later; True if anything went.

        Raises ProofError, with the module and its optimisers as they were, if the result would
        be wrong; SpaError if an optimiser's state cannot be sliced.
        """
        self._refresh()
        choices = self.kept.relative(later, self.solution)
        if choices:
            with torch.random.fork_rng(devices=[]):
                self._operate(later, choices, optimizers)
        self.kept = later
        return bool(choices)

    def _operate(self, later: Kept, choices: Choices,
                 optimizers: Iterable[torch.optim.Optimizer]) -> None:
        want = self._expected(choices) if self._check else None
        after = shrunk(self.trace, self.solution, choices)
        whole = later.choices()
        undo = operate_in_place(self.model, self.trace, self.solution, choices, optimizers,
                                (self.dense, whole))
        wrong = self._wrong(want, whole, undo) if want is not None else ""
        if wrong:
            undo()
            raise ProofError("the shrunk module is not the masked one; it was restored",
                             where=type(self.model).__name__, why=wrong,
                             fix="its own code may hold sizes: ignore those groups, or compute "
                                 "sizes from the arrays")
        self.trace, self.solution = after
        self.attributes |= undo.set_to

    def _expected(self, choices: Choices) -> list[Any]:
        """Results of the masked model; the first time with the proof's negative control."""
        if self.proof is None:
            proof = prove(self.trace, self.solution, choices, seed=self._seed)
            if not proof.holds:
                raise ProofError("the proof's negative control was not caught",
                                 why=f"a wrong index changes results by {proof.control:.1e}",
                                 fix="the example inputs may not reach every layer; pass others")
            self.proof = proof
        return masked_dense(self.trace, self.solution, choices)

    def _wrong(self, want: list[Any], whole: Choices, undo: Undo) -> str:
        """Return "" if the module computes what it must, if need be with sizes of its own set."""
        def differs() -> str:
            return runs_like(self.model, self.trace.args, self.trace.kwargs, want,
                             self._tolerance())

        problem = differs()
        if problem and (self._seen.uses or self._seen.equal):
            undo.set(self.model, resized(
                self._seen.uses, self.dense_trace, self.dense, whole).changes)
            undo.set(self.model, unmet(self.model, self.trace.args, self.trace.kwargs, self._seen))
            problem = differs()
        return problem

    def _tolerance(self) -> float:
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return max((TOLERANCES.get(kind, LIVE_FLOAT32).value for kind in kinds),
                   default=LIVE_FLOAT32.value)

    def _refresh(self) -> None:
        """Look up arrays that the user's code has put in the place of others (buffers)."""
        live = dict(named_arrays(self.model))
        for stored in (self.trace.program.state_dict, self.trace.program.constants):
            stored.update({name: live[name] for name in stored if name in live})

    def set_attributes(self, rows: Iterable[Any]) -> None:
        """Set attributes that a saved run had: (module path, name, value)."""
        for path, name, value in rows:
            value = tuple(value) if isinstance(value, list) else value
            assign(self.model.get_submodule(path), name, value)
            self.attributes[path, name] = value
