"""The proof: in float64, dense with every removed slice read as zero equals pruned.

Masks stand at the consumer, not at the producer: a BatchNorm bias revives a masked producer, but
nothing reads what no consumer reads. A negative control swaps one kept index and must fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from .axes import ONE, atoms
from .choices import Choice, Choices, keep_mask
from .emit.program import run_pruned
from .errors import ProofError
from .frontends.torch_export import Trace
from .groups import Solution
from .idioms import base
from .runner import Override, OverridingRunner, Touch
from .scores import rows
from .slicing import kept, norm_changes

TOLERANCE = 1e-10
CONTROL = 1e-4
CONTROLS = 8


@dataclass(frozen=True, slots=True)
class Proof:
    """Relative errors: `error` of the pruned program, `control` with one index swapped.

    `precision` says what it was computed in, `tolerance` what rounding may do there.
    """

    error: float
    control: float | None
    swapped: str = ""
    approximate: float | None = None
    precision: str = "float64"
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """True if the pruned model is right and the control shows that a wrong one is caught."""
        return self.error <= self.tolerance and (
            self.control is None or self.control >= max(CONTROL, 10 * self.tolerance))


def relative_error(got: list[Any], want: list[Any]) -> float:
    """Return max |got - want| / max |want| over all floating results; inf where shapes differ."""
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not isinstance(b, torch.Tensor) or not b.is_floating_point() or not b.numel():
            continue
        if a.shape != b.shape:
            return float("inf")
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        a, b = a[finite].double(), b[finite].double()
        scale = b.abs().max().item() if b.numel() else 0.0
        gap = (a - b).abs().max().item() if b.numel() else 0.0
        worst = max(worst, gap / scale if scale else gap)
    return worst


def masked_dense(trace: Trace, solution: Solution, choices: Choices, *,
                 watch: Callable[[str, Any], None] | None = None,
                 renormalise: bool = True) -> list[Any]:
    """Run the dense program in float64 with every consumer of a removed slice reading zero.

    With `renormalise`, LayerNorm over a pruned axis takes its statistics over the kept slices
    (as the pruned model does); without, over all, removed ones being zero.
    """
    places, touch = masks(solution, choices)
    override = _norms(solution, choices) if renormalise else {}
    with torch.no_grad():
        runner = OverridingRunner(trace.program, touched=places, touch=touch,
                                  override=override, double=True, watch=watch)
        return runner.call(trace.args, trace.kwargs)


def masks(solution: Solution, choices: Choices) -> tuple[dict[str, set[str]], Touch]:
    """Return which tensors each node reads through a mask, and what masks removed slices: they
    read zero, scores minus infinity."""
    made: dict[tuple[str, int | None], torch.Tensor] = {}
    scores = {(r.node, r.tensor): r.dim for r in solution.solver.reads if r.how == "score"}

    def mask(name: str, dim: int | None) -> torch.Tensor:
        if (name, dim) not in made:
            dims = solution.solver.dims[name]
            found = keep_mask([e if dim in (None, d) else ONE for d, e in enumerate(dims)], choices)
            made[name, dim] = torch.from_numpy(found)
        return made[name, dim]

    def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
        dim = scores.get((node.name, name))
        gone = torch.full((), 0 if dim is None else -torch.inf, dtype=value.dtype)
        return torch.where(_fit(mask(name, dim), value), value, gone)

    return touched(solution, choices), touch


def _fit(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Masks are made for traced sizes; only dimensions with removed slices matter."""
    for d in range(mask.ndim):
        if mask.shape[d] > 1 and mask.shape[d] != value.shape[d]:
            mask = mask.narrow(d, 0, 1)
    return mask


def touched(solution: Solution, choices: Choices) -> dict[str, set[str]]:
    """Which tensors each node reads through a mask: activations, or weights if it has no other.

    What a recurrent layer feeds back is no tensor of the graph: the weights that read it are.
    """
    found: dict[str, set[str]] = {}
    stored: dict[str, set[str]] = {}
    always: dict[str, set[str]] = {}
    for read in solution.solver.reads:
        if choices.keys() & set(atoms(solution.solver.dims[read.tensor][read.dim])):
            static = solution.graph.tensors[read.tensor].static
            kind = always if read.how == "recurrent" else stored if static else found
            kind.setdefault(read.node, set()).add(read.tensor)
    merged = {**stored, **found}
    for node, tensors in always.items():
        merged[node] = merged.get(node, set()) | tensors
    return merged


def _norms(solution: Solution, choices: Choices) -> dict[str, Override]:
    """Norms whose statistics are to be taken over kept slices only (those of an RMSNorm with a
    gain are not: its gain and eps make up for the change)."""
    made: dict[str, Override] = {}
    nodes = {node.name: node for node in solution.graph.nodes}
    for read in solution.solver.reads:
        inexact = read.how == "norm" and read.node not in solution.solver.norms
        masked = _MASKED.get(base(nodes[read.node].op)) if inexact else None
        e = solution.solver.dims[read.tensor][read.dim]
        if masked is not None and set(atoms(e)) & set(choices):
            made[read.node] = masked(torch.from_numpy(keep_mask([e], choices)))
    return made


def _masked_layer_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x = args[0]
        gain, bias = (*args[2:4], None, None)[:2]
        eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
        kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype))
        n = mask.sum()
        mean = kept.sum(-1, keepdim=True) / n
        centred = torch.where(mask, x - mean, torch.zeros((), dtype=x.dtype))
        y = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / n + eps)
        y = y * gain if gain is not None else y
        return y + bias if bias is not None else y

    return run


def _masked_group_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, groups, gain, bias, eps = (*args, *(None,) * 3)[:5]
        eps = kwargs.get("eps", 1e-5) if eps is None else eps
        zero = torch.zeros((), dtype=x.dtype)
        shape = (1, -1, *[1] * (x.ndim - 2))
        kept = mask.reshape(shape).expand_as(x).unflatten(1, (groups, -1)).flatten(2)
        values = x.unflatten(1, (groups, -1)).flatten(2)
        n = kept.sum(2, keepdim=True).clamp(min=1)
        mean = torch.where(kept, values, zero).sum(2, keepdim=True) / n
        centred = torch.where(kept, values - mean, zero)
        variance = centred.square().sum(2, keepdim=True) / n
        y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
        y = y * gain.reshape(shape) if gain is not None else y
        return y + bias.reshape(shape) if bias is not None else y

    return run


def _masked_rms_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, _, gain, eps = (*args, None, None)[:4]
        kept = torch.where(mask, x, torch.zeros((), dtype=x.dtype))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        y = kept * torch.rsqrt(kept.square().sum(-1, keepdim=True) / mask.sum() + eps)
        return y if gain is None else y * gain

    return run


_MASKED = {"layer_norm": _masked_layer_norm, "group_norm": _masked_group_norm,
           "rms_norm": _masked_rms_norm}


def prove(trace: Trace, solution: Solution, choices: Choices, *, seed: int = 0) -> Proof:
    """Compare masked dense with pruned, then with pruned after one wrong index.

    Raises ProofError, naming the first operator that differs, if the pruned program is wrong.
    """
    want = masked_dense(trace, solution, choices)
    error = _error(trace, solution, choices, want)
    weight, control = "", 0.0
    stored = {**trace.program.state_dict, **trace.program.constants}
    for attempt in range(CONTROLS):
        weight, wrong = swap(stored.__getitem__, solution, choices, seed + attempt, attempt)
        control = _error(trace, solution, choices, want, wrong)
        if control >= CONTROL:  # a slice that these inputs do not excite shows nothing
            break
    approximate = None
    if any(g.approximate for g in solution.groups.values() if g.atom in choices):
        approximate = relative_error(
            want, masked_dense(trace, solution, choices, renormalise=False))
    return Proof(error, control, weight, approximate)


def _error(trace: Trace, solution: Solution, choices: Choices, want: list[Any],
           wrong: dict[str, Choices] | None = None) -> float:
    """Relative error of the pruned program; raises ProofError if it must hold and does not."""
    problem = ""
    try:
        error = relative_error(run_pruned(trace, solution, choices, wrong=wrong), want)
    except (RuntimeError, ValueError, IndexError, TypeError) as raised:
        error, problem = float("inf"), str(raised).splitlines()[0]
    if wrong is None and not error <= TOLERANCE:
        raise ProofError(
            f"the pruned model is not the masked dense model: relative error {error:.1e}",
            where=locate(trace, solution, choices),
            why=problem or "an operator's row relates axes wrongly, or the model computes with "
                           "its sizes",
            fix="please report it; --ignore the groups of that layer to go on")
    return error


def swap(stored: Callable[[str], torch.Tensor], solution: Solution, choices: Choices,
         seed: int, attempt: int = 0) -> tuple[str, dict[str, Choices]]:
    """Give one array a wrong index: its largest kept slice for a removed one.

    Later attempts take the next largest: inputs may reach no place that reads the first, as an
    expert that no token goes to. `stored` gives an array by its name. Returns the array's name
    and the choices that it is to be sliced by.
    """
    rng = np.random.default_rng(seed)
    groups = [g for g in solution.groups.values() if g.atom in choices and g.reads]
    group = groups[int(rng.integers(len(groups)))]
    graph = solution.graph.weights()
    order = sorted(group.members, key=lambda m: (m.role != "producer",
                                                 -prod(graph[m.weight].shape)))
    for member in order:  # in an array of equal slices a wrong index changes nothing
        size = rows(stored(member.weight), solution.dims(member.weight), member.dim, group)
        norms = size.detach().float().norm(dim=-1).reshape(group.shape).numpy()
        if np.ptp(norms) > 0:
            break
    table = choices[group.atom].table.copy()
    flat = table.reshape(-1, group.size)
    norms = norms.reshape(-1, group.size) if flat.shape[0] > 1 else \
        norms.reshape(-1, group.size).sum(0, keepdims=True)
    for row, norm in zip(flat, norms, strict=True):
        removed = rng.choice(np.flatnonzero(~row))
        largest = np.argsort(np.where(row, -norm, np.inf), kind="stable")
        row[largest[attempt % row.sum()]] = False
        row[removed] = True
    changed = {**choices, group.atom: Choice(table, choices[group.atom].outers)}
    return member.weight, {member.weight: changed}


def rescaled(solution: Solution, choices: Choices) -> set[str]:
    """Values inside pruned RMSNorms, which differ by the factor that the gain undoes."""
    norms = [change.norm for change in norm_changes(solution, choices)]
    means, weights = {norm.mean for norm in norms}, {norm.gain for norm in norms}
    gains = {t.name for t in solution.graph.tensors.values() if t.weight in weights}
    inside: set[str] = set()
    for node in solution.graph.nodes:
        refs = set(node.refs())
        if refs and refs <= gains:  # the gain cast, or with a constant added
            gains.update(node.outputs)
        elif not refs & gains and (node.name in means or refs & inside):
            inside.update(node.outputs)
    return inside | gains


def locate(trace: Trace, solution: Solution, choices: Choices) -> str:
    """Name the first operator whose pruned result is not the kept part of its dense one."""
    dense: dict[str, torch.Tensor] = {}
    masked_dense(trace, solution, choices, watch=dense.__setitem__)
    found: list[str] = []
    skipped = rescaled(solution, choices)

    def compare(name: str, value: Any) -> None:
        known = name in solution.solver.dims and name not in skipped
        if found or not known or not isinstance(value, torch.Tensor):
            return
        want = kept(solution, name, dense[name], choices)
        if value.is_floating_point() and relative_error([value], [want]) > TOLERANCE:
            found.append(name)

    try:
        run_pruned(trace, solution, choices, watch=compare)
    except Exception as problem:
        return f"running it: {problem}".splitlines()[0]
    nodes = {node.name: node for node in solution.graph.nodes}
    return nodes[found[0]].title() if found and found[0] in nodes else "its results"
