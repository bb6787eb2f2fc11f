"""The steps of a compile for a torch module: traced by torch.export, emitted as a module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ..errors import ProofError, SpaError
from ..evidence.calls import Inputs
from ..groups.solution import Solution, solve
from ..rows.aten_table import TABLE
from ..stages.backend import Backend
from ..stages.proof import Proof
from ..stages.records import Decided, Emitted, Subject, Traced
from ..store.completeness import unsound
from ..store.room import is_large
from .emit import per_layer
from .emit import stock as hf
from .emit.attributes import assign, resized, unmet, watch
from .emit.biases import unbiased, with_biases
from .emit.module import held_in_code, operate
from .emit.program import Rewritten, rewrite, run_pruned
from .emit.slicer import Slicer
from .gather.context import fresh_context
from .prove import prove
from .read.export import trace
from .run.runner import Runner, Weights
from .trace import Recorded, Trace
from .weights import runs_like, weights_hash


def _check_module(module: nn.Module, where: str) -> None:
    if name := unsound(module):
        raise SpaError(f"weight {name} holds NaN or infinity", where=where,
                       fix="use a checkpoint with finite weights")


def _trace_module(module: nn.Module, inputs: Inputs, quick: bool = False,
                  checked: bool = False) -> tuple[Trace, Solution]:
    traced = trace(module, inputs, quick=quick)
    if checked and (traced.shared or isinstance(traced.program, Recorded)):
        traced.faithful = _is_faithful(module, traced)
        traced = traced if traced.faithful else trace(module, inputs, once=False)
    return traced, solve(traced.graph, TABLE, rewire=True)


def _is_faithful(module: nn.Module, trace: Trace) -> bool:
    """True if a program that is not of a run of all its code computes what its module does."""
    try:
        with torch.no_grad():
            found = Runner(trace.program).call(trace.args, trace.kwargs)
    except Exception:  # it was traced without data
        return False
    return not runs_like(module, trace.args, trace.kwargs, found)


def _add_biases(module: nn.Module, traced: Traced, owned: bool) -> nn.Module | None:
    """The module with zero biases where consumers lack one; None if none does."""
    paths = unbiased(module, traced.solution, traced.candidates)
    return with_biases(module, paths, owned=owned) if paths else None


def _prove_module(module: nn.Module, decided: Decided, seed: int) -> Proof:
    """Prove the plan on the traced program, and that the program is the module."""
    trace: Trace = decided.trace
    if not trace.faithful:
        _check_program(module, trace)
    held = decided.room is not None or not is_large(module)
    return prove(trace, decided.solution, decided.choices, seed=seed,
                 cut=_cutting(decided) if held else None)


def _check_program(module: nn.Module, trace: Trace) -> None:
    """Raise ProofError if a traced program does not compute what its module does."""
    args, kwargs = trace.args, trace.kwargs
    program = trace.program
    dense = {**program.state_dict, **program.constants}
    if trace.repaired:  # the module itself has the arrays that it was traced with
        dense |= {n: a for n, a in module.state_dict().items() if n in dense}
        dense |= trace.computed
    try:
        with torch.no_grad():
            traced = Runner(program, dense.__getitem__).call(args, kwargs)
    except Exception as problem:  # it was traced without data
        raise SpaError(
            "the network does not run on the example inputs", where=type(module).__name__,
            why=str(problem).splitlines()[0] if str(problem) else type(problem).__name__,
            fix="give inputs that it runs on") from problem
    difference = runs_like(module, args, kwargs, traced)
    if difference and not runs_like(module, args, kwargs, _called_again(module, args, kwargs)):
        raise _unlike(module, args, kwargs, difference)


def _unlike(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
            difference: str) -> ProofError:
    """Why a traced program is not its module: by the arrays that a call gives other memory."""
    what = "the traced program does not compute what the module does"
    before = {name: array.data_ptr() for name, array in module.state_dict().items()}
    _called_again(module, args, kwargs)
    moved = [n for n, a in module.state_dict().items() if a.data_ptr() != before.get(n)]
    if not moved:
        return ProofError(what, why=difference, fix="the module's code may write into values that "
                                                    "others alias, or choose by data")
    return ProofError(
        what, where=moved[0], why=f"each call computes {len(moved)} of its arrays anew from "
        f"others, and puts them in their places; {difference}",
        fix="give a module without that code: with what it computed as its weights (a "
            "re-parametrised block as its one convolution)")


def _called_again(module: nn.Module, args: tuple[Any, ...],
                  kwargs: dict[str, Any]) -> list[Any]:
    """The module's own results once more, not from seed 0: those of one that draws are others."""
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.utils._pytree.tree_leaves(module(*args, **kwargs))
    finally:
        module.train(was)


@dataclass(frozen=True)
class _Made:
    """A pruned model, its program where it is one, what stood in the way of a better form, and its
    layout where that is a plainer one than was looked for."""

    model: Any
    decided: Decided
    program: Any = None
    obstacles: tuple[str, ...] = ()
    layout: str = ""


Emitter = Callable[[Subject, Decided], _Made]


def _emit_module(subject: Subject, decided: Decided, asked: str, notes: list[str]) -> Emitted:
    """Take the first emitter whose result agrees with the proved program."""
    trace: Trace = decided.trace
    want = run_pruned(trace, decided.solution, decided.choices, double=False,
                      cut=_cutting(decided))
    problems: dict[str, str] = {}
    obstacles: tuple[str, ...] = ()
    for layout, emission, make in emitters(subject, decided):
        if not _wanted(layout, decided, asked):
            continue
        try:
            made = make(subject, decided)
        except SpaError as problem:
            difference = f"{problem.what} ({problem.why})"
        except (RuntimeError, TypeError, IndexError) as problem:  # it cannot be copied, or built
            difference = f"{type(problem).__name__}: {problem}".splitlines()[0]
        else:
            obstacles = made.obstacles or obstacles
            difference = runs_like(made.model, trace.args, trace.kwargs, want)
            if not difference:
                problems.pop(f"layout {layout} by {emission}", None)
                decided.cut.clear()  # they are the model's alone now
                notes.extend(f"{k} is not possible: {why}" for k, why in problems.items())
                return Emitted(made.model, made.layout or layout, emission, made.decided, subject,
                               made.program)
        if asked == layout != "any":
            raise SpaError(f"the {layout} layout cannot be made", why=difference,
                           fix="use --layout any")
        problems[f"layout {layout} by {emission}"] = "; ".join((difference, *obstacles[:2]))
    raise ProofError("no emitted model is the proved one", fix="please report it",
                     why="; ".join(f"{k}: {why}" for k, why in problems.items()))


def _cutting(decided: Decided) -> Weights:
    """Return what gives pruned arrays by name: each is cut once, and the emitters take it."""
    tied = decided.trace.tied
    slicer = Slicer(decided.trace, decided.solution, decided.choices, decided.room)

    def array(name: str) -> torch.Tensor:
        first = tied.get(name, name)
        if first not in decided.cut:
            decided.cut[first] = slicer.array(name)
        return decided.cut[first]

    return array


def _wanted(layout: str, decided: Decided, asked: str) -> bool:
    """Whether a layout is to be tried: those of stock configurations where one may say the plan."""
    return layout == "any" or (layout in STOCK[decided.stock] and asked in ("auto", layout))


STOCK = {"uniform": ("uniform", "per-layer"), "per-layer": ("per-layer",), "": ()}
"""Which layouts a configuration of transformers may say a plan in, the plainest first."""


def _uniform(subject: Subject, decided: Decided) -> _Made:
    module, trace = subject.model, decided.trace
    shapes = hf.pruned_shapes(module, trace.tied, decided.solution, decided.choices)
    config = hf.uniform_config(module, decided.solution, decided.choices, shapes)
    return _Made(_built(subject, decided, config, type(module)), decided)


def _per_layer(subject: Subject, decided: Decided) -> _Made:
    found = per_layer.describe(per_layer.Search(
        subject.model, decided.trace.tied, decided.solution), decided.choices)
    return _Made(_built(subject, decided, found.config, found.cls), decided,
                 layout="" if found.single else "uniform")


def _built(subject: Subject, decided: Decided, config: Any, cls: Any) -> Any:
    """The class built from a configuration, with the arrays cut."""
    module, trace = subject.model, decided.trace
    cut, made = _cutting(decided), dict[str, torch.Tensor]()
    for name in module.state_dict():
        first = trace.tied.get(name, name)
        if first not in made:
            made[first] = cut(first).detach()
    return hf.build(module, config, {
        name: made[trace.tied.get(name, name)] for name in module.state_dict()},
        hf.frozen(module), cls)


def _surgery(subject: Subject, decided: Decided) -> _Made:
    return _Made(operate(decided.trace, subject.model, decided.solution, decided.choices,
                         room=subject.room, cut=decided.cut), decided)


def _watched(subject: Subject, decided: Decided, distinct: bool = False) -> _Made:
    """Surgery, with the sizes that the module's code was seen to read brought in step too.

    Functions with caches return what plain sizes gave them before: `distinct` ones they don't
    know.
    """
    trace: Trace = decided.trace
    args, kwargs = trace.args, trace.kwargs
    seen = watch(subject.model, args, kwargs, distinct=distinct)
    sizes = resized(seen.uses, trace, decided.solution, decided.choices)
    model = operate(trace, subject.model, decided.solution, decided.choices, sizes=sizes.changes,
                    room=subject.room, cut=decided.cut)
    for path, name, value in unmet(model, args, kwargs, seen):
        assign(model.get_submodule(path), name, value)
    return _Made(model, decided, obstacles=sizes.problems)


def _rewritten(subject: Subject, decided: Decided) -> _Made:
    program, decided = _program(subject, decided, {})
    return _Made(Rewritten(program), decided, program)


EMITTERS: tuple[tuple[str, str, Emitter], ...] = (
    ("uniform", "module", _uniform),
    ("per-layer", "module", _per_layer),
    ("any", "module", _surgery),
    ("any", "module", _watched),
    ("any", "module", partial(_watched, distinct=True)),
    ("any", "program", _rewritten),
)


def emitters(subject: Subject, decided: Decided) -> list[tuple[str, str, Emitter]]:
    """The ways of making a model, the likeliest to be right first in each layout.

    Where the module's code holds sizes that change, surgery alone is seldom enough.
    """
    later = held_in_code(subject.model, decided.solution, decided.choices)
    order = {way: at + (1.5 if later and way[2] is _surgery else 0)
             for at, way in enumerate(EMITTERS)}
    return sorted(EMITTERS, key=order.__getitem__)


def _program(subject: Subject, decided: Decided,
             shared: dict[str, torch.Tensor]) -> tuple[Any, Decided]:
    """Return the re-written program, and the decision about the exported program it came from."""
    if not isinstance(decided.trace.program, ExportedProgram):  # it was recorded, not exported
        trace, solution = _trace_module(subject.model, subject.inputs)
        decided = replace(decided, trace=trace, solution=solution,
                          choices=decided.plan.choices(solution))
    return rewrite(decided.trace, decided.solution, decided.choices, shared), decided


def pruned_program(emitted: Emitted) -> Any:
    """Return the re-written exported program, sharing the module's arrays."""
    if emitted.program is not None:
        return emitted.program
    return _program(emitted.subject, emitted.decided, dict(emitted.model.state_dict()))[0]


TORCH = Backend(
    kind="torch", check=_check_module, trace=_trace_module, context=fresh_context,
    digest=weights_hash, prove=_prove_module, emit=_emit_module,
    module=lambda module, folder: module, add_biases=_add_biases)
