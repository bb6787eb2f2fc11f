"""The steps of a compile for a torch module: traced by torch.export, emitted as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..errors import ProofError, SpaError
from ..evidence.calls import Inputs
from ..groups.solution import Solution, solve
from ..rows.aten_table import TABLE
from ..stages.proof import Proof
from ..stages.records import Backend, Job
from ..store.completeness import unsound
from .emit import stock as hf
from .emit.attributes import assign, resized, unmet, watch
from .emit.biases import unbiased, with_biases
from .emit.module import operate
from .emit.program import Rewritten, rewrite, run_pruned
from .emit.slicer import Slicer
from .gather.context import fresh_context
from .prove import prove
from .read.export import trace
from .run.runner import Runner
from .trace import Trace
from .weights import runs_like, weights_hash


def _check_module(job: Job) -> None:
    if name := unsound(job.module):
        raise SpaError(f"weight {name} holds NaN or infinity", where=job.name,
                       fix="use a checkpoint with finite weights")


def _trace_module(module: nn.Module, inputs: Inputs,
                  quick: bool = False) -> tuple[Trace, Solution]:
    traced = trace(module, inputs, quick=quick)
    return traced, solve(traced.graph, TABLE, rewire=True)


def _add_biases(job: Job) -> bool:
    paths = unbiased(job.module, job.solution, job.candidates)
    job.module = with_biases(job.module, paths, owned=job.owned)
    return bool(paths)


def _prove_module(job: Job) -> Proof:
    """Prove the plan on the traced program, and that the program is the module."""
    args, kwargs = job.trace.args, job.trace.kwargs
    program = job.trace.program
    dense = {**program.state_dict, **program.constants}
    if job.trace.repaired:  # the module itself has the arrays that it was traced with
        dense |= {n: a for n, a in job.module.state_dict().items() if n in dense}
        dense |= job.trace.computed
    with torch.no_grad():
        traced = Runner(program, dense.__getitem__).call(args, kwargs)
    difference = runs_like(job.module, args, kwargs, traced)
    if difference and not runs_like(job.module, args, kwargs, _called(job.module, args, kwargs)):
        raise ProofError(
            "the traced program does not compute what the module does", why=difference,
            fix="the module's code may write into values that others alias, or choose by data")
    return prove(job.trace, job.solution, job.choices, seed=job.recipe.seed)


def _called(module: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    finally:
        module.train(was)


def _emit_module(job: Job) -> None:
    """Take the first emitter whose result agrees with the proved program."""
    want = run_pruned(job.trace, job.solution, job.choices, double=False)
    problems: dict[str, str] = {}
    for layout, emission, make in EMITTERS:
        if layout == "uniform" and not job.uniform:
            continue
        try:
            model = make(job)
        except SpaError as problem:
            difference = f"{problem.what} ({problem.why})"
        except (RuntimeError, TypeError) as problem:  # a module that cannot be copied or built
            difference = f"{type(problem).__name__}: {problem}".splitlines()[0]
        else:
            difference = runs_like(model, job.trace.args, job.trace.kwargs, want)
            if not difference:
                job.pruned, job.layout, job.emission = model, layout, emission
                problems.pop(f"layout {layout} by {emission}", None)
                job.notes.extend(f"{k} is not possible: {why}" for k, why in problems.items())
                return
        if job.recipe.layout == layout == "uniform":
            raise SpaError("the uniform layout cannot be made", why=difference,
                           fix="use --layout any")
        problems[f"layout {layout} by {emission}"] = "; ".join((difference, *job.obstacles[:2]))
    raise ProofError("no emitted model is the proved one", fix="please report it",
                     why="; ".join(f"{k}: {why}" for k, why in problems.items()))


def _uniform(job: Job) -> Any:
    shapes = hf.pruned_shapes(job.module, job.trace.tied, job.solution, job.choices)
    config = hf.uniform_config(job.module, job.solution, job.choices, shapes)
    slicer = Slicer(job.trace, job.solution, job.choices)
    made: dict[str, torch.Tensor] = {}
    for name in job.module.state_dict():
        first = job.trace.tied.get(name, name)
        if first not in made:
            made[first] = slicer.array(first).detach()
    return hf.build(job.module, config, {
        name: made[job.trace.tied.get(name, name)] for name in job.module.state_dict()},
        hf.frozen(job.module))


def _surgery(job: Job) -> Any:
    return operate(job.trace, job.module, job.solution, job.choices)


def _watched(job: Job, distinct: bool = False) -> Any:
    """Surgery, with the sizes that the module's code was seen to read brought in step too.

    Functions with caches return what plain sizes gave them before: `distinct` ones they don't
    know.
    """
    args, kwargs = job.trace.args, job.trace.kwargs
    seen = watch(job.module, args, kwargs, distinct=distinct)
    sizes = resized(seen.uses, job.trace, job.solution, job.choices)
    model = operate(job.trace, job.module, job.solution, job.choices, sizes=sizes.changes)
    for path, name, value in unmet(model, args, kwargs, seen):
        assign(model.get_submodule(path), name, value)
    job.obstacles = sizes.problems
    return model


def _rewritten(job: Job) -> Any:
    return Rewritten(_program(job))


EMITTERS: tuple[tuple[str, str, Callable[[Job], Any]], ...] = (
    ("uniform", "module", _uniform),
    ("any", "module", _surgery),
    ("any", "module", _watched),
    ("any", "module", partial(_watched, distinct=True)),
    ("any", "program", _rewritten),
)


def _program(job: Job) -> Any:
    if job.program is None:
        if not isinstance(job.trace.program, ExportedProgram):  # it was recorded, not exported
            job.trace, job.solution = _trace_module(job.module, job.inputs)
            job.choices = job.plan.choices(job.solution)
        shared = dict(job.pruned.state_dict()) if job.emission == "module" else {}
        job.program = rewrite(job.trace, job.solution, job.choices, shared)
    return job.program


def pruned_program(job: Job) -> Any:
    """Return the re-written exported program (made once, sharing the module's arrays)."""
    return _program(job)


TORCH = Backend(
    kind="torch",
    check_weights=_check_module,
    trace=_trace_module,
    context=lambda job: fresh_context(job.trace, job.solution, job.recipe.seed),
    digest=lambda job: weights_hash(job.module),
    prove=_prove_module,
    emit=_emit_module,
    add_biases=_add_biases,
)
