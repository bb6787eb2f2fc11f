"""The Python API: the words of the command line, as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from .errors import UsageError
from .evidence.calls import Inputs
from .groups.solution import Solution
from .pipeline.request import example_of, make_job
from .pipeline.run import STEPS, run
from .plan.plan import Plan
from .request.recipe import Recipe, check_names
from .sources import named as source
from .sources.backends import backend_of
from .sources.checkpoints import example_inputs
from .sources.source import Source
from .stages.records import Job, Progress
from .store.place import check_out
from .store.said import said
from .system.process import alone
from .torch_backend.kinds import is_hf
from .torch_backend.read.readable import check_exportable, check_readable


@dataclass
class Result:
    """What a compile made: `module` is the pruned module (None after a dry run)."""

    job: Job
    report: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def module(self) -> nn.Module:
        return self.job.pruned

    @property
    def plan(self) -> Plan:
        return self.job.plan

    @property
    def solution(self) -> Solution:
        return self.job.solution

    @alone()
    def save(self, out: str | Path) -> Path:
        """Write the artifact to a new directory (whole or not at all) and return its path."""
        from .artifact.write import write

        if self.job.recipe.onnx:
            check_exportable(self.job.inputs)
        self.report = write(self.job, Path(out))
        self.path = Path(out)
        return self.path


@alone()
def compile(model: str | nn.Module, example_inputs: Inputs | None = None, *, target: str,
            out: str | Path | None = None, importance: Any = "auto",
            allocation: Any = "uniform", schedule: Any = "", repair: Any = "auto",
            calibration: Any = None,
            loss: Callable[..., Any] | None = None, tokenizer: Any = None,
            adapter: str | Path | Sequence[str | Path] = (),
            recovery: Any = None, recover_data: Any = None, checkpoint: str | Path | None = None,
            name: str = "", dry_run: bool = False,
            trust_remote_code: bool = False, progress: Progress | None = None,
            **options: Any) -> Result:
    """Prune a model: find coupled slices, score, remove, prove, and (with `out`) write.

    Args:
        model: a module with `example_inputs`, or a name as on the command line.
        example_inputs: positional inputs as a tuple, or keywords as a dict; batch 2 or more.
        target: what stays: `params=70%`, `body=75%` (without embeddings and output layer) or
            `macs=60%`; `params~70%`: the nearest that can be reached.
        out: directory to write the artifact to; it must not exist.
        importance, allocation, repair: a pass by name, `module:object`, or as an object. The
            default importance is `taylor`, for ONNX files one without gradients. The
            default repair is `refit` where scoring reads real calibration data anyway.
        schedule: a pass that decides what goes while it trains on the calibration batches
            (`lora-prune`), in place of `importance`; none: one shot.
        calibration: a text file, an iterable of inputs, "none", or None for the model's own.
        tokenizer: turns calibration text into `input_ids`; saved with the artifact.
        name: what the report calls the model, and where `load` finds its code again.
        adapter: adapters, peft's directories or files of other origins (`PATH` or `PATH=weight`),
            merged first; a PeftModel as `model` is merged likewise (the user's stays as it is).
        recovery: a pass that trains the pruned module, by name, `module:object` or as an object.
        recover_data: what it trains on, given as `calibration` is (default: the same source);
            a batch's keyword `labels` goes to the loss alone.
        checkpoint: directory that a training is saved to, and continued from if it is there.
        loss: (flat results, args, kwargs) -> scalar tensor; default: cross-entropy.
        options: further fields of `Recipe` (roles, only, ignore, align, floor, layout, seed, …).

    Raises:
        UsageError: the request is malformed. TargetError: the target cannot be met.
        ProofError: the result would be wrong. SpaError: anything else that is not our bug.
    """
    check_names(options, signature(compile).parameters)
    if out is not None:
        check_out(Path(out))
    adapters = [adapter] if isinstance(adapter, (str, Path)) else adapter
    recipe = Recipe(target=target, importance=_named(importance), allocation=_named(allocation),
                    schedule=_named(schedule),
                    repair=_named(repair),
                    calibration=calibration if isinstance(calibration, str) else "",
                    adapters=tuple(map(str, adapters)),
                    recovery=_named(recovery) if recovery else "",
                    recover_data=recover_data if isinstance(recover_data, str) else "",
                    **options)
    found = _source(model, example_inputs, tokenizer, trust_remote_code, recipe, progress)
    if example_inputs is None:
        found.inputs, calibration = example_of(found.module, found.inputs, calibration)
    if recipe.onnx and out is not None and not dry_run:
        check_exportable(found.inputs)
    if recipe.decoder:
        from .deploy.decoder import check_causal_lm

        check_causal_lm(found.module)
    job = make_job(
        found.module, found.inputs, recipe, importance=importance, allocator=allocation,
        repair=repair,
        calibration=calibration, own=found.calibration, loss=loss, tokenizer=found.tokenizer,
        name=name or found.name, progress=progress, owned=isinstance(model, str),
        recovery=recovery, recover_data=recover_data,
        checkpoint=Path(checkpoint) if checkpoint is not None else None, schedule=schedule)
    job.source, job.folder = found.facts or {"kind": _kind(name)}, found.folder
    job.notes.extend(found.notes)
    result = Result(run(job, dry_run=dry_run))
    if out is not None and not dry_run:
        result.save(out)
    return result


@alone()
def inspect(model: str | nn.Module, example_inputs: Inputs | None = None, *,
            modules: Sequence[str] = (), trust_remote_code: bool = False) -> Solution:
    """Trace a model and return its solved axes and groups (print it for the whole text).

    `modules` are paths of sub-modules to look at in place of the whole.
    """
    found = _source(model, example_inputs, None, trust_remote_code, None, None)
    module, inputs = found.module, found.inputs
    if modules:
        from .torch_backend import parts

        module, inputs = parts.of(module, modules, inputs)
    return backend_of(module).trace(module, inputs, quick=True)[1]


def _kind(name: str) -> str:
    """Where the code of a user's module is found again: what its given name says, if it does."""
    kind = source.kind_of(name) if name else "module"
    return kind if kind in ("zoo", "factory", "directory") else "module"


def _named(what: Any) -> str:
    return what if isinstance(what, str) else said(what)


def _source(model: str | nn.Module, inputs: Inputs | None, tokenizer: Any, trust: bool,
            recipe: Recipe | None, progress: Progress | None) -> Source:
    if isinstance(model, str):
        if progress is not None:
            progress(f"loading {model}", 0, len(STEPS))
        found = source.load(model, trust_remote_code=trust,
                            unused=("*",) if recipe is None else recipe.unused)
        if inputs is not None:
            found.inputs = inputs
        return found
    if inputs is None and not is_hf(model):
        raise UsageError(f"there are no example inputs for {type(model).__name__}",
                         why="a module of your own does not say what it takes",
                         fix="give them: a tuple, or a dict of keywords, of two or more examples")
    check_readable(model, values=recipe is not None)
    if inputs is None:
        inputs = example_inputs(model)
    return Source(type(model).__name__, model, inputs, tokenizer)
