"""Batches as data loaders give them: labels go to the loss alone, inputs to the network.

A keyword is a label by its name ({"input_ids": ids, "labels": y}); in a pair (x, y), what the
network has no argument for is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from .calls import Inputs, as_call

Batch = tuple[tuple[Any, ...], dict[str, Any]]
LABELS = "labels"
_NAMES = {"label", "label_ids", "labels", "start_positions", "end_positions"}


def is_label(name: str) -> bool:
    """True for a keyword that names labels: labels, next_sentence_label, start_positions, ..."""
    return name in _NAMES or name.endswith(("_label", "_labels"))


def inputs_only(module: object, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's keywords without labels; one that `forward` cannot do without is an input."""
    if not any(map(is_label, kwargs)):
        return dict(kwargs)
    takes = inspect.signature(module.forward).parameters if isinstance(module, nn.Module) else {}
    needed = {name for name, p in takes.items() if p.default is p.empty}
    return {k: v for k, v in kwargs.items() if not is_label(k) or k in needed}


def labels_of(kwargs: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels of a batch, those keywords that the network takes as inputs left out."""
    return {k: v for k, v in kwargs.items() if is_label(k) and k not in taken}


def as_example(module: object, inputs: object) -> Any:
    """Return example inputs without labels: a batch (x, y) of a data loader is one, too."""
    if not isinstance(module, nn.Module) or inputs is None:
        return inputs
    args, named = _as_call(inputs)
    kwargs = inputs_only(module, named)
    extra = len(args) > 1 and not _binds(module, args, kwargs) \
        and _binds(module, args[:-1], kwargs)
    if not extra and len(kwargs) == len(named):
        return inputs
    return args[:-1] if extra else args, kwargs


def as_batch(module: object, example: Batch, batch: object) -> Batch:
    """Return one batch of a data loader as a call of the network, its labels among the keywords.

    `example` is the call that the network is traced with: what it has more positional values than
    that are labels, and one value alone is its one tensor.
    """
    args, kwargs = _as_call(batch)
    names = [k for k, v in example[1].items() if isinstance(v, torch.Tensor)]
    if args and not example[0] and len(names) == 1 and names[0] not in kwargs:
        args, kwargs = args[1:], {names[0]: args[0], **kwargs}
    if len(args) == len(example[0]) + 1 and LABELS not in kwargs:
        args, kwargs = args[:-1], {**kwargs, LABELS: args[-1]}
    make = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    wanted = "decoder_input_ids"
    if make is not None and LABELS in kwargs and wanted in example[1] and wanted not in kwargs:
        kwargs = {wanted: make(labels=kwargs[LABELS]), **kwargs}
    return args, kwargs


def _as_call(batch: object) -> Batch:
    """Return (args, kwargs) of a batch: also of keywords with labels beside them."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Mapping) \
            and not isinstance(batch[1], Mapping):
        return (), {**batch[0], LABELS: batch[1]}
    return as_call(cast(Inputs, batch))


def _binds(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return not unbound(module, args, kwargs)


def unbound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Say why a module cannot be called so, as far as its arguments' names say, or ""."""
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as problem:
        return str(problem)
    return ""
