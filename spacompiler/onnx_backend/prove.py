"""The proof for ONNX files: the masked dense graph and the pruned graph give the same results.

In float64 where ONNX Runtime has the kernels, else in float64 by ONNX's reference implementation,
else in float32: there the bound is scaled from a noise floor, which is how far results move when
inputs and weights change in their last bit. Large files are computed operator by operator, so that
no float64 copy of them is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..axes.choices import Choices, take
from ..errors import ProofError, SpaError
from ..groups.cost import cost
from ..groups.solution import Solution
from ..stages.proof import CONTROLS, Proof, needed, relative_error, swap
from ..stages.tolerances import LOCATED, NOISE_FACTOR, ONNX_NOISE, PROOF
from .emit import rewrite
from .read.stored import release
from .read.trace import OnnxTrace, redrawn
from .run import double as onnx_double
from .run import streamed
from .run.constants import Constants
from .run.masks import masked
from .run.session import Session

DOUBLE_BYTES = 2**28
"""Above this many bytes of weights no float64 copy is made: they are widened where they are used.
"""
REFERENCE_MACS, STREAMED_MACS = 4 * 10**9, 10**11
"""Multiplications above which the reference implementation would take too long; in a large file,
most of them are those of a few large products."""
PERTURBED_BYTES = 2**26


Evaluate = Callable[[ir.Model, Mapping[str, np.ndarray]], list[Any]]


@dataclass(frozen=True)
class Engine:
    """How results are computed: `precision` names it in the report."""

    precision: str
    double: bool
    evaluate: Evaluate | None = None

    def run(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[torch.Tensor]:
        """Return the floating results of a model that may be changed."""
        if self.double:
            model, feeds = onnx_double.to_double(model), onnx_double.feeds(feeds)
        evaluate = self.evaluate or (lambda model, feeds: Session(model).run(feeds))
        return as_tensors(evaluate(model, feeds))


ORT_DOUBLE = Engine("float64 (ONNX Runtime)", double=True)
REFERENCE = Engine("float64 (reference implementation)", True, onnx_double.evaluate)
STREAMED = Engine("float64 (reference implementation)", True, streamed.evaluate)
ORT_SINGLE = Engine("float32 (ONNX Runtime)", double=False)


def as_tensors(results: list[Any]) -> list[torch.Tensor]:
    """Return the floating arrays among results as tensors."""
    return [torch.from_numpy(np.array(r, dtype=np.float64 if r.dtype == np.float64
                                      else np.float32))
            for r in map(np.asarray, results) if r.dtype.kind == "f" or r.dtype.name == "bfloat16"]


def prove(trace: OnnxTrace, solution: Solution, choices: Choices, *, seed: int = 0) -> Proof:
    """Compare masked dense with pruned, then with pruned after one wrong index.

    Raises ProofError, naming the first operator that differs, if the pruned graph is wrong.
    """
    proof = _proved(trace, solution, choices, _dense(trace, solution, choices), seed)
    return proof if proof.holds else _on_others(trace, solution, choices, proof, seed)


def _proved(trace: OnnxTrace, solution: Solution, choices: Choices,
            dense: tuple[Engine, list[torch.Tensor]], seed: int) -> Proof:
    engine, want = dense
    tolerance, error = compare(trace, solution, choices, engine, want,
                               rewrite(trace, solution, choices, double=engine.double))
    if not error <= tolerance:
        raise ProofError(
            f"the pruned model is not the masked dense model: relative error {error:.1e} in "
            f"{engine.precision}, allowed {tolerance:.1e}",
            where=locate(trace, solution, choices, max(tolerance, LOCATED.value)),
            why="an operator's row relates axes wrongly, or the model computes with its sizes",
            fix="please report it; --ignore the groups of that layer to go on")
    weight, control = _control(trace, solution, choices, engine, want, seed,
                               needed(tolerance))
    return Proof(error, control, weight, None, engine.precision, tolerance)


def _on_others(trace: OnnxTrace, solution: Solution, choices: Choices, proof: Proof,
               seed: int) -> Proof:
    """Prove a plan once more where no wrong index matters: on weights drawn anew (see torch's)."""
    other = redrawn(trace, solution, seed)
    dense = _dense(other, solution, choices)
    if not all(torch.isfinite(t).all() for t in dense[1]):
        return proof
    found = _proved(other, solution, choices, dense, seed)
    return replace(found, error=max(found.error, proof.error), redrawn=True) \
        if found.holds else proof


def compare(trace: OnnxTrace, solution: Solution, choices: Choices, engine: Engine,
            want: list[torch.Tensor], pruned: ir.Model) -> tuple[float, float]:
    """Return (what rounding may do, relative error) of a pruned model, at the trace's inputs.

    Both branches of every If are compared, also that which these inputs do not take.
    """
    tolerance = PROOF.value if engine.double else _noise(trace, solution, choices, want)
    error = 0.0
    for value in (True, False) if _branches(pruned) else ():
        try:
            other = engine.run(_forced(masked(trace, solution, choices), value), trace.feeds)
        except Exception:  # a branch that inputs of these shapes do not fit
            continue
        error = max(error, _error(engine, _forced(pruned.clone(), value), trace, other))
    return tolerance, max(error, _error(engine, pruned, trace, want))


def _branches(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "If"]


def _forced(model: ir.Model, value: bool) -> ir.Model:
    """Let every If of a model take one branch, whatever its inputs say; returns the model."""
    stored = Constants(model)
    for node in _branches(model):
        node.replace_input_with(0, stored.add(np.array(value), "taken"))
    return model


def _error(engine: Engine, model: ir.Model, trace: OnnxTrace, want: list[torch.Tensor]) -> float:
    try:
        return relative_error(engine.run(model, trace.feeds), want)
    except Exception:  # a model of wrong sizes fails in as many ways as there are kernels
        return float("inf")


def elsewhere(trace: OnnxTrace, solution: Solution, choices: Choices,
              pruned: Callable[[bool], ir.Model]) -> tuple[str, float, float]:
    """Compare a pruned model at a trace's (other) sizes: (precision, tolerance, error).

    `pruned(double)` makes it, exact gains in float64 or not.
    """
    engine, want = _dense(trace, solution, choices)
    return engine.precision, *compare(trace, solution, choices, engine, want,
                                      pruned(engine.double))


def _dense(trace: OnnxTrace, solution: Solution,
           choices: Choices) -> tuple[Engine, list[torch.Tensor]]:
    """Run the masked model by the first engine that can."""
    size = sum(v.const_value.nbytes for v in trace.model.graph.initializers.values()
               if v.const_value is not None)
    first, limit, second = ([ORT_DOUBLE], REFERENCE_MACS, REFERENCE) if size <= DOUBLE_BYTES \
        else ([], STREAMED_MACS, STREAMED)
    exact = [*first, *([second] if cost(solution, "macs").total <= limit else [])]
    for engine in exact:
        try:
            return engine, _finite(engine.run(masked(trace, solution, choices), trace.feeds))
        except Exception:  # no kernel, no type rule, no reference: the next one may do
            continue
    want = _finite(ORT_SINGLE.run(masked(trace, solution, choices), trace.feeds))
    release(trace.model)
    return ORT_SINGLE, want


def _finite(results: list[torch.Tensor]) -> list[torch.Tensor]:
    if not results or not any(r.numel() for r in results):
        raise ProofError("the model returns no floating numbers to compare",
                         fix="give example inputs at which it does (--calibration inputs.npz)")
    return results


def _noise(trace: OnnxTrace, solution: Solution, choices: Choices,
           want: list[torch.Tensor]) -> float:
    """What rounding in float32 may do to the results, with a margin."""
    rng = np.random.default_rng(0)
    model, budget = masked(trace, solution, choices), PERTURBED_BYTES
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 1 and \
                tensor.nbytes <= budget:
            budget -= tensor.nbytes
            value.const_value = ir.Tensor(_moved(tensor.numpy(), rng), name=value.name)
    feeds = {n: _moved(a, rng) if a.dtype == np.float32 else a for n, a in trace.feeds.items()}
    floor = relative_error(ORT_SINGLE.run(model, feeds), want)
    release(trace.model)
    return min(NOISE_FACTOR.value * max(floor, 2.0**-23), ONNX_NOISE.value)


def _moved(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    signs = rng.choice(np.array([-1, 1], np.float32), array.shape)
    return (array * (1 + signs * np.float32(2.0**-23))).astype(np.float32)


def _control(trace: OnnxTrace, solution: Solution, choices: Choices, engine: Engine,
             want: list[torch.Tensor], seed: int, needed: float) -> tuple[str, float]:
    weight, control = "", 0.0
    for attempt in range(CONTROLS):
        weight, wrong = swap(lambda n: torch.from_numpy(np.array(trace.stored(n), np.float32)),
                             solution, choices, seed + attempt, attempt)
        model = rewrite(trace, solution, choices, wrong, double=engine.double)
        control = _error(engine, model, trace, want)
        if control >= needed:
            break
    return weight, control


def locate(trace: OnnxTrace, solution: Solution, choices: Choices, tolerance: float) -> str:
    """Name the first operator whose pruned result is not the kept part of its dense one."""
    names = [out for node in solution.graph.nodes for out in node.outputs]
    try:
        dense = Session(masked(trace, solution, choices), names).run(trace.feeds, names)
        pruned = Session(rewrite(trace, solution, choices), names).run(trace.feeds, names)
    except SpaError as problem:
        return f"running it: {problem.why}"
    makers = {out: node for node in solution.graph.nodes for out in node.outputs}
    for name, one, other in zip(names, dense, pruned, strict=True):
        if np.asarray(one).dtype.kind != "f":
            continue
        want = take(one, solution.solver.dims[name], choices)
        if np.isfinite(np.asarray(want, np.float64)).any() and \
                not relative_error(as_tensors([other]), as_tensors([want])) <= tolerance:
            return makers[name].title()
    return "its results"
