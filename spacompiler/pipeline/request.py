"""From what is asked to a request and its subject: passes and data, found before work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import SpaError, UsageError
from ..evidence.calibration import (
    HELD_OUT,
    ORIGINS,
    PYTHON_TEXT,
    Calibration,
    Draw,
    filled,
    from_arrays,
    from_string,
    from_text,
    python_text,
)
from ..evidence.calls import Inputs, as_call
from ..evidence.labels import as_batch, as_example
from ..evidence.losses import default_loss
from ..evidence.prototypes import Order, by_prototype
from ..evidence.where import find
from ..request import registry
from ..request.options import known
from ..request.recipe import Recipe
from ..request.recipe_file import GIVEN
from ..sources.backends import backend_of
from ..stages.records import Progress, Request, Subject
from ..store.said import said
from ..torch_backend.gather.texts import Reader
from . import defaults


def _holds_arrays(place: Path) -> bool:
    return place.suffix in (".npz", ".npy") or os.path.isdir(place)


Data = str | Path | Iterable[Any] | None
"""What to calibrate with, or to train on: see `resolve`."""


OF_TEXT, FURTHER, OF_OTHERS = 8, 16, 16
"""Windows of a text that gradients are taken of, more that are only read forward (which is a third
of the work, and is what least squares want), and examples of other data, where none are asked for.
"""


class Windows(NamedTuple):
    """How much of a text is read: windows, tokens in each, windows in a batch, and the seed; which
    of them (one of CHOICES); windows that repair reads beside. None is what suits the data."""

    samples: int | None = None
    length: int = 128
    batch: int = 2
    seed: int = 0
    choice: str = "random"
    further: int | None = None

    @property
    def of_others(self) -> int:
        """How many examples are taken of data that is no text."""
        return OF_OTHERS if self.samples is None else self.samples

    def drawn(self) -> dict[str, int]:
        """How much is read of what is no text, as keywords."""
        return {"samples": self.of_others, "length": self.length, "batch": self.batch,
                "seed": self.seed}

    def of_text(self, length: int) -> Draw:
        """How much of a text is read in windows of a length, as keywords."""
        samples, more = (OF_TEXT, FURTHER) if self.samples is None else (self.samples, 0)
        further = more if self.further is None else self.further
        return {"samples": samples, "length": length, "batch": self.batch, "seed": self.seed,
                "further": further}

    def taken(self, text: bool) -> dict[str, int]:
        """The options of a recipe that say so much, of a text or of other data."""
        if not text:
            return {"samples": self.of_others}
        found = self.of_text(self.length)
        return {"samples": found["samples"], "further_samples": found["further"]}

    def order(self, module: nn.Module) -> Order | None:
        """In which order windows are taken; None is at random.

        Raises UsageError if the network has no table of tokens to embed them by.
        """
        if self.choice == "random":
            return None
        find = getattr(module, "get_input_embeddings", lambda: None)
        table = getattr(find(), "weight", None)
        if not isinstance(table, torch.Tensor):
            raise UsageError(f"windows cannot be chosen by {self.choice}",
                             why=f"{type(module).__name__} has no embedding of tokens",
                             fix="leave --choice out")
        return by_prototype(table.detach(), self.choice, self.seed)


@dataclass(frozen=True)
class Given:
    """What a caller hands over as objects, of which a recipe can keep no more than the names.

    Passes are names or objects, in place of the recipe's; `own(n, seed)` yields example batches
    where the model brings its own; `loss` is (results, args, kwargs) -> scalar; `tokenizer` turns
    text into `input_ids`; `owned` says that the compile may use the module up, `checkpoint` where
    a training is saved, `work` where finished steps are kept.
    """

    importance: object = None
    allocation: object = None
    schedule: object = None
    repair: object = None
    recovery: object = None
    calibration: Data = None
    recover_data: Data = None
    own: Callable[[int, int], Iterable[Any]] | None = None
    loss: Callable[..., Any] | None = None
    tokenizer: Callable[..., Any] | None = None
    name: str = ""
    progress: Progress | None = None
    checkpoint: Path | None = None
    work: Path | None = None
    owned: bool = False

    def names(self) -> dict[str, str]:
        """What a recipe keeps: names of passes, and of files of data."""
        passes = {entry.name: getattr(self, entry.name) for entry in known(Recipe)
                  if entry.about.passes}
        data = {"calibration": self.calibration, "recover_data": self.recover_data}
        return {**{kind: what if isinstance(what, str) else said(what)
                   for kind, what in passes.items() if what is not None},
                **{word: what for word, what in data.items() if isinstance(what, str)}}

    def filled(self, recipe: Recipe) -> Given:
        """With the names that a recipe says where nothing was given."""
        return replace(self, calibration=recipe.calibration or None
                       if self.calibration is None or self.calibration == "" else self.calibration,
                       recover_data=recipe.recover_data or None
                       if self.recover_data is None or self.recover_data == ""
                       else self.recover_data)

    def asked(self, recipe: Recipe, option: str) -> object:
        """The pass that an option of a recipe names, or the one in its place."""
        given = getattr(self, option)
        left = given is None or (isinstance(given, str) and given in ("", "auto"))
        return getattr(recipe, option) if left else given


def _check_named(what: Data) -> None:
    """Raise UsageError for a word that names no data that can be read."""
    if what == GIVEN:
        raise UsageError("the recipe's data was given in Python, and is not part of it",
                         fix="give it again: calibration=batches, or --calibration FILE")
    if isinstance(what, str) and not what.strip():
        raise UsageError("the name of the data is empty",
                         fix="leave it out, or give a file, sampled, or none")


def resolve(what: Data, inputs: Inputs, module: nn.Module, windows: Windows, *,
            tokenizer: Callable[..., Any] | None = None,
            own: Callable[[int, int], Iterable[Any]] | None = None) -> Calibration:
    """Return the calibration that a user asked for.

    `what` is a path, an iterable of inputs, "none" (the example inputs only), "sampled" (what
    the module makes up, see `sampling`), "own" (the model's data), "python" (text that Python
    carries), or None: the first of own, python (where there is a tokenizer) and none that there is.
    """
    _check_named(what)
    if what == "own" and own is None:
        raise UsageError("the model brings no data of its own", where="calibration own",
                         fix="give a file, batches, or leave calibration out")
    ordered = list[bool]()

    def order() -> Order | None:
        ordered.append(True)
        return windows.order(module)

    found = _resolved(what, inputs, module, windows, order, tokenizer, own)
    if windows.choice != "random" and not ordered:
        raise UsageError("choice has nothing to act on", why=f"{found.origin} is no text",
                         fix="give a text as calibration, or leave choice out")
    if windows.further and not ordered:
        raise UsageError("further_samples has nothing to act on", why=f"{found.origin} is no text",
                         fix="give a text as calibration, or leave further_samples out")
    drawn = found.origin in DRAWN or (isinstance(what, (str, Path)) and what != "none")
    return replace(found, taken=windows.taken(bool(ordered)) if ordered or drawn else {})


DRAWN = (ORIGINS["sampled"], ORIGINS["own"])
"""Origins of data that is no text, of which as many examples are taken as is asked for."""


def _resolved(what: Data, inputs: Inputs, module: nn.Module, windows: Windows,
              order: Callable[[], Order | None], tokenizer: Callable[..., Any] | None,
              own: Callable[[int, int], Iterable[Any]] | None) -> Calibration:
    if what == "sampled":
        from ..torch_backend.gather.sampling import sampled

        made = sampled(module, inputs, tokenizer, **windows.drawn())
        return Calibration(ORIGINS["sampled"], made)
    if what in (None, "own") and own is not None:
        batches, held_out = ([as_batch(module, as_call(inputs), b) for b in own(count, seed)]
                             for count, seed in ((max(1, windows.of_others // 2), windows.seed),
                                                 (2, windows.seed + HELD_OUT)))
        return Calibration(ORIGINS["own"], batches, held_out=held_out)
    reader = Reader(module, as_call({} if inputs is None else inputs), tokenizer)
    if what == "python" or (what is None and tokenizer is not None and not reader.refusal):
        return reader.read(lambda length: from_string(
            python_text(), tokenizer, origin=PYTHON_TEXT, order=order(),
            **windows.of_text(length)), windows.length)
    if what in (None, "none"):
        return Calibration(ORIGINS["none"], [as_call(inputs)], real=False)
    if isinstance(what, (str, Path)) and _holds_arrays(Path(what)):
        return from_arrays(Path(what), windows.of_others)
    if isinstance(what, (str, Path)):
        return reader.read(lambda length: from_text(
            str(what), tokenizer, order=order(), **windows.of_text(length)), windows.length)
    batches = [as_batch(module, as_call(inputs), b) for b in what]
    if not batches:
        raise SpaError("calibration has no batches", fix="pass at least one batch of inputs")
    return Calibration(f"{len(batches)} batches", filled(batches))


def example_of(module: nn.Module, made: Inputs, calibration: Data) -> tuple[Inputs, Data]:
    """Return example inputs where none were given, and the calibration that they came from.

    They are the first batch of a data loader that holds other inputs than were made up.
    """
    if calibration is None or isinstance(calibration, (str, Path)) \
            or not isinstance(module, nn.Module):
        return made, calibration
    batches = list(calibration)
    if not batches or not isinstance(batches[0], Mapping):
        return made, batches
    first = {k: v for k, v in as_call(as_example(module, batches[0]))[1].items()
             if isinstance(v, torch.Tensor)}
    known = {k: v for k, v in as_call(made)[1].items() if isinstance(v, torch.Tensor)}
    return (first if first.keys() != known.keys() else made), batches


def make_request(model: nn.Module, inputs: Inputs, recipe: Recipe,
                 given: Given | None = None) -> tuple[Request, Subject]:
    """Resolve passes and calibration data; raises before anything is computed."""
    given = given or Given()
    scorer = registry.find("importance", defaults.importance_for(
        model, given.asked(recipe, "importance"), given.calibration, recipe.effort))
    schedule, mends = given.asked(recipe, "schedule"), given.asked(recipe, "repair")
    trains = registry.find("schedule", schedule) if schedule else None
    needs = bool(scorer.needs) or trains is not None or mends not in ("auto", "none") \
        or bool(recipe.blocks or recipe.low_rank)
    inputs = as_example(model, inputs)
    unread = not needs and given.calibration == "own" and given.own is not None
    batches = resolve("none" if unread else given.calibration, inputs, model,
                      Windows(recipe.samples, recipe.length, recipe.batch, recipe.seed,
                              recipe.choice, recipe.further_samples),
                      tokenizer=given.tokenizer, own=given.own if needs else None)
    fits = trains is None and not recipe.keep_adapter
    ask = Request(
        recipe, scorer, registry.find("allocation", defaults.allocation_for(
            model, given.asked(recipe, "allocation"), batches,
            () if trains else scorer.needs, recipe.effort)), batches,
        compensation=_compensation(defaults.repair_for(
            mends, bool(scorer.needs) and fits and batches.real, recipe.effort), batches),
        must_repair=mends != "auto" and "repair" not in recipe.automatic,
        schedule=trains, place=given.work, loss=given.loss or default_loss,
        tokenizer=given.tokenizer, name=given.name or type(model).__name__,
        where=find(recipe.device, recipe.dtype),
        tell=given.progress or (lambda stage, done, total: None))
    return _with_recovery(ask, given, model, inputs), Subject(
        model, inputs, backend_of(model), owned=given.owned,
        given=None if given.owned else model)


def _with_recovery(ask: Request, given: Given, model: nn.Module, inputs: Inputs) -> Request:
    """Find the pass that trains what is left, and its data, if one is asked for."""
    recipe, asked = ask.recipe, given.asked(ask.recipe, "recovery")
    if not asked:
        return ask
    data = resolve(
        given.calibration if given.recover_data is None else given.recover_data, inputs, model,
        Windows(recipe.recover_samples, recipe.length, recipe.recover_batch, recipe.seed + 1),
        tokenizer=given.tokenizer, own=given.own)
    return replace(ask, recovery=registry.find("recovery", asked), recover_data=data,
                   checkpoint=given.checkpoint)


def _compensation(what: object, batches: Calibration) -> Any:
    """The compensation pass, or None: then what stays keeps its weights."""
    if what == "none":
        return None
    found = registry.find("compensation", what)
    if not batches.real:
        raise UsageError(f"repair {found.name!r} needs calibration data",
                         why="the example inputs alone say too little about what layers read",
                         fix="give --calibration, or --repair none")
    return found
