"""The Python API: the words of the command line, as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from .errors import UsageError
from .evidence.calls import Inputs
from .groups.solution import Solution
from .pipeline import estimate
from .pipeline.inputs import named_inputs
from .pipeline.inspected import opened
from .pipeline.request import Data, Given, example_of, make_request
from .pipeline.resolved import check_hashes
from .pipeline.run import STAGES, run
from .pipeline.sweep import Evaluate
from .pipeline.sweep import sweep as run_sweep
from .pipeline.swept import Sweep
from .plan.plan import Plan
from .request.needs import check_needs
from .request.options import listing, spoken
from .request.recipe import Errand, Recipe
from .request.targets import parse_targets
from .sources import named as source
from .stages.compiled import Compiled
from .stages.records import Progress, Request, Subject
from .store.place import check_out
from .store.room import Room, is_large
from .system.group import here, joined
from .system.process import alone
from .system.shown import shown
from .torch_backend.read.readable import check_exportable


@dataclass(repr=False)
class Result:
    """What a compile made: `module` is the pruned module (None after a dry run)."""

    job: Compiled
    report: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def module(self) -> nn.Module:
        """The pruned module."""
        return self.job.pruned

    @property
    def plan(self) -> Plan:
        """What goes: the kept indices of every group, as plain data."""
        return self.job.plan

    @property
    def solution(self) -> Solution:
        """The solved axes and groups."""
        return self.job.solution

    def __repr__(self) -> str:
        """A few lines: what is left, how it was proved, where it lies."""
        from .artifact.report import summary

        return summary(self.job, self.path)

    @alone()
    def save(self, out: str | Path) -> Path:
        """Write the artifact to a new directory (whole or not at all) and return its path."""
        from .artifact.write import write

        if self.job.recipe.onnx:
            check_exportable(self.job.inputs)
        self.report = write(self.job, Path(out))
        self.path = Path(out)
        return self.path

    def _repr_html_(self) -> str:
        """A table for notebooks: what is left of what."""
        from .artifact import page, report

        return page.table(self.report or report.facts(self.job))

    def push_to_hub(self, repository: str, *, private: bool = True,
                    token: str | None = None) -> str:
        """Upload the artifact that was saved to a model repository and return its address.

        Raises SpaError if nothing was saved, or the hub refuses.
        """
        from .artifact.card import push

        if self.path is None:
            raise UsageError("there is nothing to upload", fix="save the result first: save(DIR)")
        return push(self.path, repository, private=private, token=token)


# The signature of `compile` is public: what may be an object here, or is of another type than in a
# recipe, is spelt out for editors and type checkers; every other option comes from the table alone.
@alone()
def compile(model: str | nn.Module | Recipe, example_inputs: Inputs | None = None, *,
            target: str = "", recipe: Recipe | str | Path | None = None,
            out: str | Path | None = None, importance: object = "auto",
            allocation: object = "auto", schedule: object = "", repair: object = "auto",
            recovery: object = "", calibration: Data = None, recover_data: Data = None,
            loss: Callable[..., Any] | None = None, tokenizer: Callable[..., Any] | None = None,
            adapter: str | Path | Sequence[str | Path] = (), name: str = "",
            checkpoint: str | Path | None = None, dry_run: bool = False,
            trust_remote_code: bool = False, progress: Progress | None = None,
            quiet: bool = False, work: str | Path | None = None, processes: str = "auto",
            **options: object) -> Result:
    """Prune a model: find coupled slices, score, remove, prove, and (with `out`) write.

    Passes are given by name, as `module:object`, or as objects; `calibration` and `recover_data`
    as files, by the words below, or as iterables of inputs (a batch's `labels` go to the loss
    alone). A PeftModel is merged, and the user's stays as it is.

    Args:
        model: a module with `example_inputs`, a name as on the command line, or a recipe that
            names one.
        example_inputs: positional inputs as a tuple, or keywords as a dict; batch 2 or more.
        recipe: a recipe or its file, of which the keywords that are given here replace parts.
        loss: (flat results, args, kwargs) -> scalar tensor; default: cross-entropy.
        tokenizer: turns calibration text into `input_ids`; saved with the artifact.
        name: what the report calls the model, and where `load` finds its code again.
        progress: is called with (stage, done, total) as the work goes on; default: a bar, where
            stderr is a terminal or this a notebook.
        quiet: show no bar.
{options}

    Raises:
        UsageError: the request is malformed. TargetError: the target cannot be met.
        ProofError: the result would be wrong. SpaError: anything else that is not our bug.
    """
    given = Given(importance, allocation, schedule, repair, recovery, calibration, recover_data,
                  loss=loss, tokenizer=tokenizer, name=name)
    adapters = [adapter] if isinstance(adapter, (str, Path)) else adapter
    words = {"target": target, "adapter": tuple(map(str, adapters)), **given.names(), **options}
    model, asked = _asked(model, recipe, words)
    errand = Errand.of({"out": out, "dry_run": dry_run, "checkpoint": checkpoint,
                        "trust_remote_code": trust_remote_code, "work": work,
                        "processes": processes})
    with shown(progress, quiet) as tick:
        return _compile(model, example_inputs, asked,
                        replace(given.filled(asked), progress=tick), errand)


PUBLIC = frozenset(signature(compile).parameters) - {"options"}
"""Keywords that `compile` spells out."""
compile.__doc__ = (compile.__doc__ or "").replace("{options}", "\n".join(
    listing(table, " " * 8) for table in (Recipe, Errand)))


def _asked(model: str | nn.Module | Recipe, recipe: Recipe | str | Path | None,
           words: Mapping[str, object]) -> tuple[str | nn.Module, Recipe]:
    """Return the model and what is asked for; words at their defaults replace nothing.

    Raises UsageError for a recipe without a model, or a request without a target.
    """
    recipe = model if isinstance(model, Recipe) else recipe
    defaults = {e.keyword: "" if e.default is MISSING else e.default for e in spoken(Recipe)}
    said = {w: v for w, v in words.items() if w not in defaults or v != defaults[w]}
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.read(recipe, **said)
    elif recipe is not None:
        recipe = recipe.but(said, PUBLIC)
    elif not words["target"]:
        raise UsageError("there is no target", fix="say what stays: target='params=70%'")
    else:
        recipe = Recipe.of(words, beside=PUBLIC)
    if isinstance(model, Recipe):
        model = recipe.model
        if not model:
            raise UsageError("the recipe names no model",
                             why="it was made of a module that only you have",
                             fix="compile(module, example_inputs, recipe=recipe)")
    check_hashes(recipe)
    return model, recipe


def _compile(model: str | nn.Module, inputs: Inputs | None, recipe: Recipe, given: Given,
             errand: Errand) -> Result:
    with joined(errand.processes == "together") as team:
        if not team.first:
            given = replace(given, progress=None)
        return _compiled(model, inputs, recipe, given, errand)


def _compiled(model: str | nn.Module, inputs: Inputs | None, recipe: Recipe, given: Given,
              errand: Errand) -> Result:
    """Compile here, or with others: then one process writes, and the others wait for it."""
    team = here()
    out = None if errand.dry_run else errand.out
    if errand.out is not None:
        check_out(errand.out, work=errand.work, checkpoint=errand.checkpoint)
    ask, subject = _prepared(model, inputs, recipe, given, errand, writes=out is not None)
    if said := estimate.check(ask, subject, out):
        ask.tell(said, 0, len(STAGES))
    if out is not None:
        subject = replace(subject, room=_room(ask, subject, out))
    result = Result(run(ask, subject, dry_run=errand.dry_run,
                        helps=out is not None and not team.first))
    if out is not None:
        team.of_first(lambda: str(result.save(out)), "writing")
        result.path = out
    return result


def _room(ask: Request, subject: Subject, out: Path) -> Room | None:
    """Where the arrays of a large model's result lie until they are written: beside `out`.

    In memory where they are to be trained.
    """
    model = subject.model
    large = is_large(model)
    trains = ask.recovery is not None or ask.schedule is not None
    return Room(out) if large and not trains else None


def _prepared(model: str | nn.Module, inputs: Inputs | None, recipe: Recipe, given: Given,
              errand: Errand, *, writes: bool) -> tuple[Request, Subject]:
    """Find the model, its inputs and the data: what a compile starts from."""
    check_needs({"recovery": given.asked(recipe, "recovery"), "recover_data": given.recover_data,
                 "checkpoint": errand.checkpoint}, {})
    if isinstance(model, str) and given.progress is not None:
        given.progress(f"loading {model}", 0, len(STAGES))
    found = opened(model, inputs, given.tokenizer, trust=errand.trust_remote_code,
                   unused=recipe.unused, values=True)
    if found.adapter and found.adapter not in recipe.adapters:
        recipe = replace(recipe, adapters=(found.adapter, *recipe.adapters))
    if inputs is None:
        found.inputs = named_inputs(found.module, found.inputs, recipe)
        found.inputs, data = example_of(found.module, found.inputs, given.calibration)
        given = replace(given, calibration=data)
    if recipe.onnx and writes:
        check_exportable(found.inputs)
    if recipe.decoder or recipe.runtime:
        from .deploy.cached import with_cache

        recipe = with_cache(recipe, found.module)
    if recipe.gguf:
        from .deploy.gguf_early import for_gguf

        recipe = for_gguf(recipe, found.module, found.notes)
    ask, subject = make_request(found.module, found.inputs, recipe, replace(
        given, own=found.calibration, tokenizer=found.tokenizer, name=given.name or found.name,
        owned=isinstance(model, str), checkpoint=errand.checkpoint, work=errand.work))
    ask = replace(ask, model=model if isinstance(model, str) else
                  "" if _kind(given.name) == "module" else given.name)
    ask.notes.extend(found.notes)
    return ask, replace(subject, source=found.facts or {"kind": _kind(given.name)},
                        folder=found.folder, sound=found.sound)


HANDED = ("importance", "allocation", "repair", "calibration", "loss", "tokenizer", "name",
          "progress")
"""What a sweep may be given as objects, beside options."""


@alone()
def sweep(model: str | nn.Module | Recipe, example_inputs: Inputs | None = None, *,
          sizes: Sequence[float] = (0.9, 0.75, 0.6, 0.5), metric: str = "params",
          evaluate: Evaluate | None = None, allow: float = 0.05, latency: bool = False,
          recipe: Recipe | str | Path | None = None, **options: Any) -> Sweep:
    """Try several sizes of a model, traced once and scored once, and say which one to take.

    Args:
        sizes: shares that stay, of `metric`.
        evaluate: module -> number, more is better; default: the loss on data that nothing else
            looks at, or how many likeliest answers stay the same.
        allow: the winner is the smallest size that loses no more than this share: of the number,
            or of perplexity.
        latency: time each size in ONNX Runtime too.

    Others, and further keywords, are those of `compile`. Raises what it raises.
    """
    targets = [f"{metric}~{share:.6g}" for share in sorted(set(sizes), reverse=True)]
    if not targets:
        raise UsageError("there are no sizes to try", fix="give some: sizes=(0.9, 0.5)")
    for target in targets:
        parse_targets(target)
    given = Given(**{word: options.pop(word) for word in HANDED if word in options})
    errand = Errand(trust_remote_code=options.pop("trust_remote_code", False))
    words = {"target": targets[0], "adapter": (), **given.names(), **options}
    model, asked = _asked(model, recipe, words)
    ask, subject = _prepared(model, example_inputs, asked, given.filled(asked), errand,
                             writes=False)
    points, dense = run_sweep(ask, subject, targets, evaluate, timed=latency)
    return Sweep(ask.name, points, allow, dense)


def _kind(name: str) -> str:
    """Where the code of a user's module is found again: what its given name says, if it does."""
    kind = source.kind_of(name) if name else "module"
    return kind if kind in ("zoo", "factory", "directory") else "module"
