"""From a request to a job: passes and calibration data, found before work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpaError, UsageError
from ..evidence.calibration import (
    PYTHON_TEXT,
    Calibration,
    _filled,
    from_arrays,
    from_string,
    from_text,
    python_text,
)
from ..evidence.calls import Inputs, as_call
from ..evidence.labels import as_batch, as_example
from ..evidence.losses import default_loss
from ..request import registry
from ..request.recipe import Recipe
from ..sources.backends import backend_of
from ..stages.records import Job, Progress
from ..torch_backend.gather.texts import Reader
from . import defaults


def _holds_arrays(place: Path) -> bool:
    return place.suffix in (".npz", ".npy") or os.path.isdir(place)


def resolve(what: Any, inputs: Inputs, *, tokenizer: Any = None, own: Any = None,
            samples: int = 16, length: int = 128, batch: int = 2, seed: int = 0,
            module: Any = None) -> Calibration:
    """Return the calibration that a user asked for.

    `what` is a path, an iterable of inputs, "none" (the example inputs only), "sampled" (what
    the module makes up, see `sampling`), or None: the model's own calibration data where it has
    some, text that Python carries where the model has a tokenizer, else the example inputs.
    """
    if what == "sampled":
        from ..torch_backend.gather.sampling import sampled

        return Calibration("sampled from the model itself", sampled(
            module, inputs, tokenizer, samples=samples, length=length, batch=batch, seed=seed))
    if what is None and own is not None:
        return Calibration("the model's own", [as_batch(module, as_call(inputs), b)
                                               for b in own(max(1, samples // 2), seed)])
    reader = Reader(module, as_call(inputs or {}), tokenizer)
    if what is None and tokenizer is not None and not reader.refusal:
        return reader.read(lambda length: from_string(
            python_text(), tokenizer, samples=samples, length=length, batch=batch, seed=seed,
            origin=PYTHON_TEXT), length)
    if what is None or what == "none":
        return Calibration("example inputs only", [as_call(inputs)], real=False)
    if isinstance(what, (str, Path)) and _holds_arrays(Path(what)):
        return from_arrays(Path(what), samples)
    if isinstance(what, (str, Path)):
        return reader.read(lambda length: from_text(
            str(what), tokenizer, samples=samples, length=length, batch=batch, seed=seed), length)
    batches = [as_batch(module, as_call(inputs), b) for b in what]
    if not batches:
        raise SpaError("calibration has no batches", fix="pass at least one batch of inputs")
    return Calibration(f"{len(batches)} batches", _filled(batches))


def example_of(module: Any, made: Inputs, calibration: Any) -> tuple[Inputs, Any]:
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


def make_job(module: nn.Module, inputs: Inputs, recipe: Recipe, *, importance: Any = None,
             allocator: Any = None, repair: Any = None, calibration: Any = None,
             own: Any = None, loss: Any = None, tokenizer: Any = None, name: str = "",
             progress: Progress | None = None, owned: bool = False, recovery: Any = None,
             recover_data: Any = None, checkpoint: Path | None = None,
             schedule: Any = None) -> Job:
    """Resolve passes and calibration data; raises before anything is computed."""
    scorer = registry.find("importance", defaults.importance_for(
        module, importance or recipe.importance, calibration))
    schedule = schedule or recipe.schedule
    trains = registry.find("schedule", schedule) if schedule else None
    mends = repair or recipe.repair
    needs = bool(scorer.needs) or trains is not None or mends not in ("auto", "none") \
        or bool(recipe.blocks)
    inputs = as_example(module, inputs)
    batches = resolve(calibration, inputs, tokenizer=tokenizer, own=own if needs else None,
                      samples=recipe.samples, length=recipe.length, batch=recipe.batch,
                      seed=recipe.seed, module=module)
    fits = trains is None and not recipe.keep_adapter
    job = Job(recipe, module, inputs, scorer,
              registry.find("allocation", allocator or recipe.allocation), batches,
              backend_of(module), loss or default_loss, name or type(module).__name__, tokenizer,
              progress or (lambda stage, done, total: None), owned=owned, schedule=trains,
              compensation=_compensation(mends, batches, bool(scorer.needs) and fits),
              must_repair=mends != "auto", given=None if owned else module)
    if recovery or recipe.recovery:
        job.recovery, job.checkpoint = registry.find("recovery", recovery or recipe.recovery), \
            checkpoint
        job.recover_data = resolve(
            calibration if recover_data is None else recover_data, inputs, tokenizer=tokenizer,
            own=own, samples=recipe.recover_samples, length=recipe.length,
            batch=recipe.recover_batch, seed=recipe.seed + 1, module=module)
    return job


def _compensation(what: Any, batches: Calibration, fits: bool) -> Any:
    """The compensation pass, or None: then what stays keeps its weights.

    `fits` says that one may be taken unasked.
    """
    if what == "auto":
        what = "refit" if fits and batches.real else "none"
    if what == "none":
        return None
    found = registry.find("compensation", what)
    if not batches.real:
        raise UsageError(f"repair {found.name!r} needs calibration data",
                         why="the example inputs alone say too little about what layers read",
                         fix="give --calibration, or --repair none")
    return found
