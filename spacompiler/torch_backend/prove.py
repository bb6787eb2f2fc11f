"""The proof: in float64, dense with every removed slice read as zero equals pruned.

Masks stand at the consumer, not at the producer: a BatchNorm bias revives a masked producer, but
nothing reads what no consumer reads. A negative control swaps one kept index and must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..axes.choices import Choices
from ..errors import ProofError
from ..evidence.where import runs_out
from ..groups.solution import Solution
from ..plan.effects import rescaled
from ..stages.comparison import tensors
from ..stages.proof import CONTROLS, Proof, relative_error, swap
from ..stages.tolerances import CONTROL, PROOF
from .emit.program import run_pruned
from .emit.slicer import kept
from .run.aside import Aside
from .run.draws import check_draws_nothing
from .run.masks import masks, norms
from .run.runner import OverridingRunner, Weights
from .trace import Trace, redrawn


def masked_dense(trace: Trace, solution: Solution, choices: Choices, *,
                 watch: Callable[[str, Any], None] | None = None,
                 renormalise: bool = True) -> list[Any]:
    """Run the dense program in float64 with every consumer of a removed slice reading zero.

    With `renormalise`, LayerNorm over a pruned axis takes its statistics over the kept slices
    (as the pruned model does); without, over all, removed ones being zero.
    """
    override = norms(solution, choices) if renormalise else {}
    with torch.no_grad():
        runner = OverridingRunner(trace.program, reads=masks(solution, choices),
                                  override=override, watch=watch, where=trace.proving)
        return runner.call(trace.args, trace.kwargs)


def prove(trace: Trace, solution: Solution, choices: Choices, *, seed: int = 0,
          cut: Weights | None = None) -> Proof:
    """Compare masked dense with pruned, then with pruned after one wrong index.

    `cut` gives arrays by name as the choices slice them, to have that done once. Raises ProofError,
    naming the first operator that differs, if the pruned program is wrong.
    """
    want = masked_dense(trace, solution, choices)
    if not any(torch.isfinite(t).any() for t in tensors(want) if t.numel()):
        raise ProofError("no result of the network is a finite number",
                         why="where all is NaN or infinite, nothing can be compared",
                         fix="give example inputs, and weights, that it computes numbers from")
    error, weight, control = _both(trace, solution, choices, want, seed, cut)
    approximate = None
    if any(g.approximate for g in solution.groups.values() if g.atom in choices):
        approximate = relative_error(
            want, masked_dense(trace, solution, choices, renormalise=False))
    proof = Proof(error, control, weight, approximate)
    return proof if control >= CONTROL.value else _on_others(trace, solution, choices, proof, seed)


def _both(trace: Trace, solution: Solution, choices: Choices, want: list[Any],
          seed: int, cut: Weights | None = None) -> tuple[float, str, float]:
    """Return the error of the pruned program, the array that got a wrong index, and how far
    results are off by it."""
    stored = {**trace.program.state_dict, **trace.program.constants}
    try:
        weight, wrong = swap(stored.__getitem__, solution, choices, seed)
    except ValueError:  # nothing reads what goes: the plan itself is wrong
        _error(trace, solution, choices, want)
        raise
    aside = Aside({name for name, first in trace.tied.items() if first in
                   {trace.tied.get(one, one) for one in wrong}})
    error = _error(trace, solution, choices, want, None, aside, cut)
    control = _error(trace, solution, choices, want, wrong, aside, cut)
    for attempt in range(1, CONTROLS):
        if control >= CONTROL.value:  # a slice that these inputs do not excite shows nothing
            break
        weight, wrong = swap(stored.__getitem__, solution, choices, seed + attempt, attempt)
        control = _error(trace, solution, choices, want, wrong, cut=cut)
    return error, weight, control


def _on_others(trace: Trace, solution: Solution, choices: Choices, proof: Proof,
               seed: int) -> Proof:
    """Prove a plan once more where no wrong index matters: on weights drawn anew.

    A branch of tiny or zero weights (a fresh LayerScale, a zero-initialised last layer) hides
    what is wrong in it, and so do units that are dead. The first proof stands where the results
    of other weights are not finite, or no index matters to them either.
    """
    other = redrawn(trace, seed)
    want = masked_dense(other, solution, choices)
    if not all(torch.isfinite(t).all() for t in tensors(want)):
        return proof
    error, weight, control = _both(other, solution, choices, want, seed)
    return replace(proof, error=max(proof.error, error), control=control, swapped=weight,
                   redrawn=True) if control >= CONTROL.value else proof


def _error(trace: Trace, solution: Solution, choices: Choices, want: list[Any],
           wrong: dict[str, Choices] | None = None, aside: Aside | None = None,
           cut: Weights | None = None) -> float:
    """Relative error of the pruned program; raises ProofError if it must hold and does not."""
    problem = ""
    try:
        error = relative_error(run_pruned(
            trace, solution, choices, wrong=wrong, aside=aside, cut=cut), want)
    except (RuntimeError, ValueError, IndexError, TypeError) as raised:
        if runs_out(raised):
            raise
        error, problem = float("inf"), str(raised).splitlines()[0]
    if wrong is None and not error <= PROOF.value:
        check_draws_nothing(trace, solution.graph)
        raise ProofError(
            f"the pruned model is not the masked dense model: relative error {error:.1e}",
            where=locate(trace, solution, choices),
            why=problem or "an operator's row relates axes wrongly, or the model computes with "
                           "its sizes",
            fix="please report it; --ignore the groups of that layer to go on")
    return error


def locate(trace: Trace, solution: Solution, choices: Choices) -> str:
    """Name the first operator whose pruned result is not the kept part of its dense one."""
    dense: dict[str, torch.Tensor] = {}
    masked_dense(trace, solution, choices, watch=dense.__setitem__)
    found: list[str] = []
    skipped = rescaled(solution, choices)

    def look(name: str, value: object) -> None:
        known = name in solution.solver.dims and name not in skipped
        if found or not known or not isinstance(value, torch.Tensor):
            return
        want = kept(solution, name, dense[name], choices)
        if value.is_floating_point() and torch.isfinite(want).any() and \
                not relative_error([value], [want]) <= PROOF.value:
            found.append(name)

    try:
        run_pruned(trace, solution, choices, watch=look)
    except Exception as problem:
        return f"running it: {problem}".splitlines()[0]
    nodes = {node.name: node for node in solution.graph.nodes}
    return nodes[found[0]].title() if found and found[0] in nodes else "its results"
