"""What tests of operators and of whole networks share: random choices, and slicing commutes.

For random kept slices, each value of the pruned program must be the kept part of the same value
of the masked dense one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from spacompiler.axes.choices import Choice, Choices
from spacompiler.axes.expressions import Atom, walk
from spacompiler.groups.solution import Solution
from spacompiler.plan.effects import rescaled
from spacompiler.stages.proof import relative_error
from spacompiler.torch_backend.emit.program import run_pruned
from spacompiler.torch_backend.emit.slicer import kept
from spacompiler.torch_backend.prove import masked_dense
from spacompiler.torch_backend.read import export as torch_export
from spacompiler.torch_backend.trace import Trace


def table_of(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """A random choice of `count` along the last dimension, another one in every row."""
    return np.argsort(np.argsort(rng.random(shape), axis=-1), axis=-1) < count


def choose(solution: Solution, rng: np.random.Generator, least: int = 1) -> Choices:
    """Random kept slices of random free atoms; fibred ones, often, with their own in each row."""
    by_atom = solution.by_atom()
    every = dict.fromkeys(
        a for dims in solution.solver.dims.values() for e in dims for a in walk(e))
    made: dict[Atom, Choice] = {}
    for atom in every:
        fewest = max([k for e, k in solution.solver.least if e is atom], default=least)
        if atom.frozen or atom.size <= fewest or rng.random() < 0.25:
            continue
        count = int(rng.integers(fewest, atom.size))
        group = by_atom.get(atom)
        if group is not None and group.outers and rng.random() < 0.7:
            made[atom] = Choice(table_of(rng, group.shape, count), group.outers)
        else:
            made[atom] = Choice(table_of(rng, (atom.size,), count))
    return made


def differences(found: Trace, solution: Solution, choices: Choices,
                random: bool = False) -> dict[str, float]:
    """Relative error of every value; inf where a shape or an integer differs."""
    dense: dict[str, Any] = {}
    pruned: dict[str, Any] = {}
    masked_dense(found, solution, choices, watch=dense.__setitem__)
    run_pruned(found, solution, choices, watch=pruned.__setitem__)
    factors = rescaled(solution, choices)
    return {name: gap(pruned[name],
                      kept(solution, name, dense[name], choices), random)
            for node in found.graph.nodes for name in node.outputs
            if name in dense and name in pruned and name not in factors}


def gap(got: torch.Tensor, want: torch.Tensor, random: bool = False) -> float:
    if random:
        return 0.0 if got.shape == want.shape else float("inf")
    if want.is_complex() and got.is_complex():
        got, want = (torch.view_as_real(x.resolve_conj()) for x in (got, want))
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    assert torch.isfinite(want).all()
    return relative_error([got], [want])


def quick_trace(module: nn.Module, *args: torch.Tensor) -> Trace:
    """Trace with concrete sizes: what torch.export yields without its checks, in a tenth of
    its time."""
    arrays = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(arrays: dict[str, torch.Tensor], *args: torch.Tensor) -> Any:
        return functional_call(module, arrays, args)

    with torch.no_grad():
        made = make_fx(call, pre_dispatch=True)(arrays, *args)
    constants = _lifted(made)
    inputs = [n for n in made.graph.nodes if n.op == "placeholder"]
    learned = {name for name, _ in module.named_parameters()}
    targets = [*constants, *arrays, *[None] * len(args)]
    specs = [SimpleNamespace(arg=SimpleNamespace(name=node.name), target=target,
                             kind=InputKind.USER_INPUT if target is None else
                             InputKind.PARAMETER if target in learned else
                             InputKind.CONSTANT_TENSOR if target in constants else
                             InputKind.BUFFER)
             for node, target in zip(inputs, targets, strict=True)]
    (leaves,) = next(iter(made.graph.find_nodes(op="output"))).args
    results = [SimpleNamespace(kind=OutputKind.USER_OUTPUT, arg=SimpleNamespace())
               for _ in pytree.tree_leaves(leaves)]
    program: Any = SimpleNamespace(
        graph=made.graph, graph_module=made, state_dict=arrays, constants=constants,
        graph_signature=SimpleNamespace(input_specs=specs, output_specs=results))
    torch_export.drop_asserts(made.graph)
    torch_export._canonicalise(made.graph)
    graph, tied = torch_export.lower(program, module)
    return Trace(program, graph, args, {}, tied)


def _lifted(made: Any) -> dict[str, torch.Tensor]:
    """Make constants inputs, in front of all others, as torch.export does."""
    constants, first = {}, next(iter(made.graph.nodes))
    for node in made.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constants[name] = getattr(made, name)
        with made.graph.inserting_before(first):
            given = made.graph.placeholder(f"c{name}")
        given.meta["val"] = constants[name]
        node.replace_all_uses_with(given)
        made.graph.erase_node(node)
    made.recompile()
    return constants
