"""The pipeline, as one list: trace, solve, score, allocate, plan, prove, emit, check, write.

Each step is a function of the job so far; between any two of them the job can be looked at.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import allocation, registry
from .axes import Choices
from .calibration import Calibration, default_loss, resolve
from .cost import cost
from .emit import hf
from .emit.attributes import resized, watch
from .emit.module import operate, runs_like
from .emit.program import Rewritten, rewrite, run_pruned
from .errors import ControlError, ProofError, SpaError, TargetError, TraceError, UsageError
from .frontends.aten import TABLE
from .frontends.torch_export import Inputs, Trace, trace
from .groups import Group, Solution, solve
from .plan import Plan, make_plan
from .proof import CONTROL, Proof, prove
from .recipe import METRICS, Recipe, parse_target
from .runner import Runner
from .scores import Scores
from .slicing import Slicer
from .statistics import forward_only

Progress = Callable[[str, int, int], None]


@dataclass
class Job:
    """A compile under way; later fields are filled by later steps.

    `module` is a torch module, or what another front end reads: then it brings its `backend`.
    """

    recipe: Recipe
    module: nn.Module
    inputs: Inputs
    importance: Any
    allocation: Any
    calibration: Calibration
    loss: Any = default_loss
    name: str = ""
    tokenizer: Any = None
    progress: Progress = lambda stage, done, total: None
    trace: Trace = None  # type: ignore[assignment]
    solution: Solution = None  # type: ignore[assignment]
    candidates: list[Group] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    compensation: Any = None
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
    owned: bool = False
    recovery: Any = None
    recover_data: Calibration | None = None
    checkpoint: Path | None = None
    trained: dict[str, Any] | None = None
    schedule: Any = None
    counts: dict[str, int] = field(default_factory=dict)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    base_hash: str = ""
    kept: Any = None

    @property
    def backend(self) -> Backend:
        """What carries out the steps that depend on where the model lives."""
        return backend_of(self.module)


@dataclass(frozen=True)
class Backend:
    """The steps of a compile that depend on where the model lives: mostly functions of the job.

    `trace` returns a trace (with its `graph`) and its solution, `context` what importance
    passes see, `digest` the hash of the dense weights, `prove` the proof; `emit` sets `pruned`,
    `layout` and `emission`; `repair` changes the traced arrays and returns notes; `write` fills
    the artifact's folder and adds to the report's data.
    """

    check_weights: Callable[[Job], None]
    trace: Callable[[Any, Inputs], tuple[Any, Solution]]
    context: Callable[[Job], Any]
    digest: Callable[[Job], str]
    prove: Callable[[Job], Proof]
    emit: Callable[[Job], None]
    write: Callable[[Job, Path, dict[str, Any]], None]
    repair: Callable[[Job], list[str]] | None = None


def backend_of(module: Any) -> Backend:
    """Return the backend that a front end put on what it read, or torch's."""
    found = getattr(module, "backend", None)
    return found if isinstance(found, Backend) else TORCH


def merge_adapters(job: Job) -> None:
    """Merge the recipe's adapters, or those of a PeftModel, into the module before analysis."""
    from . import recovery
    from .adapters import files, keeping, merging

    if job.recovery is not None:
        recovery.check(job)
    if job.backend is not TORCH and job.recipe.adapters:
        raise SpaError("adapters need a torch module", where=job.name,
                       fix="merge them before exporting to ONNX, or give the module itself")
    if job.recipe.keep_adapter:
        keeping.check(job)
        job.base_hash = weights_hash(job.module)
    if merging.is_adapted(job.module):
        job.module, notes = merging.merge_adapted(job.module, job.inputs)
        job.notes.extend(notes)
    if job.recipe.adapters:
        adapters = [files.read(*files.parse(text)) for text in job.recipe.adapters]
        job.notes.extend(files.other_names(adapters, job.name))
        module = job.module if job.owned else copy.deepcopy(job.module)
        job.module, notes = merging.merge(module, adapters, job.inputs,
                                          combine=job.recipe.combine,
                                          base=job.base if job.recipe.keep_adapter else None)
        job.notes.extend(notes)


def check_weights(job: Job) -> None:
    """Raise SpaError if a weight is not finite."""
    job.backend.check_weights(job)


def _check_module(job: Job) -> None:
    for name, tensor in job.module.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SpaError(f"weight {name} holds NaN or infinity", where=job.name,
                           fix="use a checkpoint with finite weights")


def _trace_module(module: nn.Module, inputs: Inputs) -> tuple[Trace, Solution]:
    traced = trace(module, inputs)
    return traced, solve(traced.graph, TABLE, rewire=True)


def analyse(job: Job) -> None:
    """Trace the module (or parts of it), solve its axes, and list the groups that may shrink."""
    if job.schedule is not None and not job.owned:  # it trains
        job.module, job.owned = copy.deepcopy(job.module), True
    trace_whole_or_parts(job)
    job.candidates = _candidates(job)
    if job.compensation is not None and job.compensation.create_biases:
        _add_biases(job)
    if not job.candidates:
        roles = sorted({g.role for g in job.solution.groups.values()})
        raise TargetError(
            "nothing to prune", where=job.name,
            why=f"no group has a role in {list(job.recipe.roles)}; groups found: "
                f"{len(job.solution.groups)} ({', '.join(roles) or 'none'})",
            fix="see `spacompiler inspect`; let more go with --roles, --only or --approximate")


def trace_whole_or_parts(job: Job) -> None:
    """Set `trace` and `solution`; what cannot be traced whole is entered by its largest parts."""
    from . import parts

    if job.recipe.modules:
        parts.enter(job, job.recipe.modules)
    try:
        job.trace, job.solution = job.backend.trace(job.module, job.inputs)
    except TraceError as problem:
        found = () if job.recipe.modules else parts.traceable(job.module, job.inputs)
        if not found:
            raise
        job.notes.append(f"{problem.what}: {problem.why} in {problem.where}")
        parts.enter(job, found)
        job.trace, job.solution = job.backend.trace(job.module, job.inputs)


def _candidates(job: Job) -> list[Group]:
    r = job.recipe
    return allocation.candidates(job.solution, roles=r.roles, only=r.only, ignore=r.ignore,
                                 approximate=r.approximate)


def _add_biases(job: Job) -> None:
    """Put zero biases where consumers lack one, and trace again if any was missing."""
    from .repair import add_biases, unbiased

    if job.backend.repair is None:
        return
    paths = unbiased(job.module, job.solution, job.candidates)
    if not paths:
        return
    module = job.module if job.owned else copy.deepcopy(job.module)
    job.module, job.biased = add_biases(module, paths), True
    job.trace, job.solution = job.backend.trace(job.module, job.inputs)
    job.candidates = _candidates(job)


def score(job: Job) -> None:
    """Run calibration if the importance pass needs it, then score every candidate.

    A schedule trains instead, and leaves scores and counts.
    """
    if job.schedule is not None:
        job.schedule.run(job)
        return
    context = job.context = _context(job)
    try:
        _score(job, context)
    finally:
        getattr(context, "close", lambda: None)()


def _context(job: Job) -> Any:
    """What importance passes see: adapters' gradients come from the module itself."""
    if "adapter_steps" not in job.importance.needs:
        return job.backend.context(job)
    from .live.probe import Probe

    if job.backend is not TORCH:
        raise UsageError(f"{job.importance.name!r} needs a torch module",
                         fix="use a criterion without gradients")
    return Probe(job.module, job.trace, job.solution, job.recipe.seed)


def _score(job: Job, context: Any) -> None:
    for group in _calibrated(job, context):
        value = torch.as_tensor(job.importance.score(group, context)).detach().double()
        if tuple(value.shape) != group.shape or not torch.isfinite(value).all():
            raise SpaError(
                f"importance pass {job.importance.name!r} gave no valid scores for {group.name}",
                why=f"shape {tuple(value.shape)} for {group.shape}, "
                    f"finite: {bool(torch.isfinite(value).all())}",
                fix="a score is a finite tensor of shape group.shape")
        job.scores[group.name] = value.numpy()


def _calibrated(job: Job, context: Any) -> Iterable[Group]:
    """Yield the candidates as their statistics become complete.

    Covariances are held for one block at a time where the backend can stream them.
    """
    needs, batches = job.importance.needs, job.calibration.batches
    total = len(batches)
    done = iter(range(1, total + 1))
    if not needs:
        return job.candidates
    if forward_only(needs) and "covariance" in needs and hasattr(context, "stream"):
        job.progress("calibrating", 0, total)
        return context.stream(needs, batches, job.candidates)
    context.calibrate(needs, batches, job.loss, groups=job.candidates,
                      tick=lambda: job.progress("calibrating", next(done), total))
    return job.candidates


def decide(job: Job) -> None:
    """Allocate counts under the target (unless a schedule has) and make the plan."""
    r = job.recipe
    counts = job.counts or allocate_counts(job)
    job.plan = make_plan(job.candidates, job.scores, counts, target=r.target,
                         weights_hash=job.backend.digest(job), recipe=r.as_dict())
    job.choices = job.plan.choices(job.solution)
    job.plan.costs.update(costs(job.solution, job.choices))


def allocate_counts(job: Job) -> dict[str, int]:
    """Return how many slices each candidate keeps, by the allocation pass and the target.

    Raises TargetError if the target is missed.
    """
    r = job.recipe
    metric, share = parse_target(r.target)
    price = cost(job.solution, metric)
    dense = price.total
    for found in _units(job):
        price.set({g.atom: g.size for g in job.candidates})
        problem = allocation.Problem(found, price, share * dense, dense, metric,
                                     measure=_measure(job))
        kept = job.allocation.allocate(problem)
        if problem.met(kept):
            break
        job.uniform = False
    allocation.check_met(problem, kept)
    return _counts(job, found, kept)


def _counts(job: Job, units: Iterable[allocation.Unit], kept: Mapping[str, int]) -> dict[str, int]:
    counts = {g.name: g.size for g in job.candidates}
    return counts | {g.name: kept[u.name] for u in units for g in u.groups}


def _measure(job: Job) -> Any:
    """What allocation passes may measure on a torch module: nothing is done until they ask."""
    if not isinstance(job.module, nn.Module):
        return None
    from .measure import Measure

    def choices(problem: allocation.Problem, kept: Mapping[str, int]) -> Choices:
        counts = _counts(job, problem.units, kept)
        return make_plan(job.candidates, job.scores, counts).choices(job.solution)

    return Measure(job.module, job.trace, job.solution, job.calibration.batches, job.loss,
                   _statistics(job), job.compensation, choices)


def _statistics(job: Job) -> Any:
    """The context of the importance pass, for what it still holds, or a fresh one."""
    return job.context if isinstance(job.context, Scores) else job.backend.context(job)


def _units(job: Job) -> Iterator[tuple[allocation.Unit, ...]]:
    """Yield what to allocate over: first the units that a stock config can express, then all."""
    r = job.recipe

    def units(uniform: bool) -> tuple[allocation.Unit, ...]:
        return allocation.units(job.solution, job.candidates, job.scores, uniform=uniform,
                                align=r.align, lanes=lanes(), floor=r.floor,
                                absolute=getattr(job.importance, "absolute", False))

    stock = hf.is_hf(job.module) and not job.biased and r.layout in ("auto", "uniform")
    if stock:
        found, notes = hf.expressible(job.module, job.trace.tied, job.solution, units(True))
        job.notes.extend(notes)
        if not found and r.layout == "uniform":
            raise TargetError("no group can shrink in the uniform layout", why=notes[0],
                              fix="use --layout any")
        if found:
            job.uniform = True
            yield tuple(found)
    if r.layout != "uniform":
        if stock:
            job.notes.append("the target is out of reach of the uniform layout: layout any")
        yield units(False)


def costs(solution: Solution, choices: Choices) -> dict[str, dict[str, int]]:
    """Return {metric: {dense, pruned}} for every metric."""
    found = {}
    for metric in METRICS:
        price = cost(solution, metric)
        dense = price.total
        pruned = price.set({atom: choice.count for atom, choice in choices.items()})
        found[metric] = {"dense": dense, "pruned": pruned}
    return found


def lanes() -> int:
    """Return the channel block of this CPU's convolutions: 16 with AVX-512, else 8."""
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8


def weights_hash(module: nn.Module) -> str:
    """Return sha256 over names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def mend(job: Job) -> None:
    """Let the compensation pass repair what stays, in the traced program."""
    if job.compensation is None:
        return
    if job.backend.repair is None:
        raise SpaError(f"repair {job.compensation.name!r} needs a torch module", where=job.name,
                       fix="use --repair none")
    job.notes.extend(job.backend.repair(job))
    job.context = None


def _repair_program(job: Job) -> list[str]:
    from .repair import repair

    return repair(job.trace, job.solution, job.choices, job.compensation, _statistics(job),
                  job.calibration.batches)


def prove_plan(job: Job) -> None:
    """Prove the plan in float64 before anything is emitted."""
    if not job.recipe.prove:
        job.notes.append("the proof was skipped on request")
        return
    job.proof = job.backend.prove(job)
    if not job.proof.holds:
        raise ControlError(
            "the proof's negative control was not caught",
            why=f"a wrong index in {job.proof.swapped} changes results by "
                f"{job.proof.control:.1e} only (needed {CONTROL:.0e}; error {job.proof.error:.1e}, "
                f"allowed {job.proof.tolerance:.0e})",
            fix="the example inputs may not reach that layer; pass other ones")
    if job.proof.approximate is not None:
        job.notes.append(
            "LayerNorm statistics are taken over fewer slices: results differ from the masked "
            f"dense model by {job.proof.approximate:.1e} (the wiring is proved)")


def emit(job: Job) -> None:
    """Make the pruned model in memory."""
    job.backend.emit(job)


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


def keep_adapter(job: Job) -> None:
    """Take a kept adapter out of the pruned model again, cut to its size."""
    from .adapters import keeping

    if job.recipe.keep_adapter:
        keeping.keep(job)


def recover(job: Job) -> None:
    """Train the pruned module, if the recipe asks for it."""
    from . import recovery

    if job.recovery is not None:
        recovery.recover(job)


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
        name: made[job.trace.tied.get(name, name)] for name in job.module.state_dict()})


def _surgery(job: Job) -> Any:
    return operate(job.trace, job.module, job.solution, job.choices)


def _watched(job: Job) -> Any:
    """Surgery, with the sizes that the module's code was seen to read brought in step too."""
    uses = watch(job.module, job.trace.args, job.trace.kwargs)
    sizes = resized(uses, job.trace, job.solution, job.choices)
    model = operate(job.trace, job.module, job.solution, job.choices, sizes=sizes.changes)
    job.obstacles = sizes.problems
    return model


def _rewritten(job: Job) -> Any:
    return Rewritten(_program(job))


EMITTERS: tuple[tuple[str, str, Callable[[Job], Any]], ...] = (
    ("uniform", "module", _uniform),
    ("any", "module", _surgery),
    ("any", "module", _watched),
    ("any", "program", _rewritten),
)


def _program(job: Job) -> Any:
    if job.program is None:
        shared = dict(job.pruned.state_dict()) if job.emission == "module" else {}
        job.program = rewrite(job.trace, job.solution, job.choices, shared)
    return job.program


def pruned_program(job: Job) -> Any:
    """Return the re-written exported program (made once, sharing the module's arrays)."""
    return _program(job)


def _prove_module(job: Job) -> Proof:
    """Prove the plan on the traced program, and that the program is the module."""
    args, kwargs = job.trace.args, job.trace.kwargs
    program = job.trace.program
    dense = {**program.state_dict, **program.constants}
    if job.trace.repaired:  # the module itself has the arrays that it was traced with
        dense |= {n: a for n, a in job.module.state_dict().items() if n in dense}
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


def _write_module(job: Job, folder: Path, data: dict[str, Any]) -> None:
    from .write import write_module

    write_module(job, folder, data)


TORCH = Backend(
    check_weights=_check_module,
    trace=_trace_module,
    context=lambda job: Scores(job.trace, job.solution, job.recipe.seed),
    digest=lambda job: weights_hash(job.module),
    prove=_prove_module,
    emit=_emit_module,
    write=_write_module,
    repair=_repair_program,
)


STEPS: tuple[tuple[str, Callable[[Job], None]], ...] = (
    ("merging adapters", merge_adapters),
    ("checking weights", check_weights),
    ("tracing and solving axes", analyse),
    ("scoring", score),
    ("allocating", decide),
    ("repairing", mend),
    ("proving", prove_plan),
    ("emitting", emit),
    ("keeping the adapter", keep_adapter),
    ("recovering", recover),
)
DRY_STEPS = 5


def run(job: Job, *, dry_run: bool = False) -> Job:
    """Carry out the steps; a dry run stops at the plan."""
    steps = STEPS[:DRY_STEPS] if dry_run else STEPS
    for i, (stage, function) in enumerate(steps):
        job.progress(stage, i, len(steps))
        with _settings(job.recipe.seed):
            function(job)
    return job


@contextmanager
def _settings(seed: int) -> Iterator[None]:
    """Seed torch's generator for one step and give the user's state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_job(module: nn.Module, inputs: Inputs, recipe: Recipe, *, importance: Any = None,
             allocator: Any = None, repair: Any = None, calibration: Any = None,
             own: Any = None, loss: Any = None, tokenizer: Any = None, name: str = "",
             progress: Progress | None = None, owned: bool = False, recovery: Any = None,
             recover_data: Any = None, checkpoint: Path | None = None,
             schedule: Any = None) -> Job:
    """Resolve passes and calibration data; raises before anything is computed."""
    scorer = registry.find("importance", importance or recipe.importance)
    schedule = schedule or recipe.schedule
    trains = registry.find("schedule", schedule) if schedule else None
    mends = repair or recipe.repair
    needs = bool(scorer.needs) or trains is not None or mends != "none"
    batches = resolve(calibration, inputs, tokenizer=tokenizer, own=own if needs else None,
                      samples=recipe.samples, length=recipe.length, batch=recipe.batch,
                      seed=recipe.seed, module=module)
    job = Job(recipe, module, inputs, scorer,
              registry.find("allocation", allocator or recipe.allocation), batches,
              loss or default_loss, name or type(module).__name__, tokenizer,
              progress or (lambda stage, done, total: None), owned=owned, schedule=trains,
              compensation=_compensation(mends, batches))
    if recovery or recipe.recovery:
        job.recovery, job.checkpoint = registry.find("recovery", recovery or recipe.recovery), \
            checkpoint
        job.recover_data = resolve(
            calibration if recover_data is None else recover_data, inputs, tokenizer=tokenizer,
            own=own, samples=recipe.recover_samples, length=recipe.length,
            batch=recipe.recover_batch, seed=recipe.seed + 1)
    return job


def _compensation(what: Any, batches: Calibration) -> Any:
    """The compensation pass, or None: then what stays keeps its weights."""
    if what == "none":
        return None
    found = registry.find("compensation", what)
    if not batches.real:
        raise UsageError(f"repair {found.name!r} needs calibration data",
                         why="the example inputs alone say too little about what layers read",
                         fix="give --calibration, or --repair none")
    return found


def frozen_reasons(solution: Solution) -> dict[str, list[str]]:
    """Return {reason: dimensions that it freezes}, most frequent first."""
    found: dict[str, list[str]] = {}
    for weight, dim, why in solution.frozen():
        for reason in why[:1]:
            found.setdefault(reason, []).append(f"{weight}:{dim}")
    return dict(sorted(found.items(), key=lambda kv: -len(kv[1])))
