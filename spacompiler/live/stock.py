"""Transformers models that shrink so that their own configuration can say how wide they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from spacompiler.errors import SpaError
from spacompiler.live.shrinking import Shrinking
from spacompiler.plan.problem import Unit
from spacompiler.plan.stock_units import expressible as expressible_units
from spacompiler.system.process import warn_user
from spacompiler.torch_backend.emit import stock as hf
from spacompiler.torch_backend.emit.unsaved import described, refuse_to_save
from spacompiler.torch_backend.kinds import is_hf
from spacompiler.torch_backend.weights import results, runs_like


def expressible(live: Shrinking, units: Sequence[Unit]) -> tuple[list[Unit], list[str]]:
    """Return the units that a stock config can express, and notes on the others (dense model)."""
    if not is_hf(live.model):
        return [], []
    fit = hf.fits(live.model, live.dense_trace.tied, live.dense)
    return expressible_units(units, fit, type(live.model.config).__name__)


def with_losses(unit: Unit, single: Mapping[str, Unit]) -> Unit:
    """Return a unit of several groups with the losses of `single` units, one for each group."""
    return replace(unit, losses=np.sum([single[g.name].losses for g in unit.groups], axis=0))


def bring_config(live: Shrinking) -> str:
    """Set the model's config to its widths; returns "" or why that is not possible.

    The config object is kept; it is changed only if the model computes the same with it.
    """
    model: Any = live.model
    choices = live.kept.choices()
    shapes = hf.pruned_shapes(model, live.dense_trace.tied, live.dense, choices)
    try:
        config = hf.uniform_config(model, live.dense, choices, shapes)
    except SpaError as problem:
        return f"{problem.what} ({problem.why})"
    assert config is not None
    wanted, old = config.to_dict(), model.config.to_dict()
    changes = {key: value for key, value in wanted.items() if value != old.get(key)}
    want = results(model, live.trace.args, live.trace.kwargs)
    _set(model.config, changes)
    wrong = runs_like(model, live.trace.args, live.trace.kwargs, want)
    if wrong:
        _set(model.config, {key: old[key] for key in changes})
    return wrong


UNFINISHED = (
    "this model is being pruned, and its configuration does not say its widths yet: "
    "from_pretrained does not load what is written now; Pruner.load with the pruner's state and "
    "load_state_dict do")


def save_unfinished(model: Any, *args: object, **kwargs: object) -> object:
    """Stand in for `save_pretrained` while a model shrinks: write, and warn of what is written."""
    warn_user(UNFINISHED)
    return type(model).save_pretrained(model, *args, **kwargs)


def begin_shrinking(model: nn.Module) -> None:
    """Let every transformers model in a module warn where it is saved before the end."""
    for part in filter(is_hf, model.modules()):
        vars(part)["save_pretrained"] = partial(save_unfinished, part)


def end_shrinking(model: nn.Module) -> bool:
    """Let those save that their configuration describes, and the others refuse; True if all do."""
    parts = [*filter(is_hf, model.modules())]
    for part in parts:
        vars(part).pop("save_pretrained", None)
    wrong = [part for part in parts if not described(part)]
    for part in wrong:
        vars(part)["save_pretrained"] = refuse_to_save
    return not wrong


def _set(config: object, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        setattr(config, key, value)
