"""Leave what is the user's as it was: every attribute of a module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .caches import caches_off


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Run in eval mode without caches, and put back every attribute of every sub-module after it.

    Modes, registered arrays, the values of buffers and caches (fake tensors among them) return to
    what they were; of lists and dicts in attributes, their entries do. A module that writes into
    its parameters has changed for good: there, plain attributes stay in step with these.
    """
    before = [(part, {k: (v, _entries(v)) for k, v in vars(part).items()})
              for part in module.modules()]
    flags = [(p, p.requires_grad, _version(p)) for p in module.parameters()]
    values = [(b, _version(b), b.detach().clone()) for b in module.buffers()]
    module.eval()
    try:
        with caches_off(module):
            yield
    finally:
        changed = any(_version(parameter) != version for parameter, _, version in flags)
        for part, attributes in before:
            _restore(vars(part), {k: v for k, v in attributes.items()
                                  if not changed or k[0] == "_" or k == "training"}, changed)
        for parameter, flag, _ in flags:
            parameter.requires_grad_(flag)
        for buffer, version, value in values:
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(value)


def _version(array: torch.Tensor) -> int:
    """How often an array was written into, where torch counts that."""
    return 0 if array.is_inference() else array._version


_TABLES = frozenset((dict, OrderedDict, list, set))


def _entries(value: object) -> Any:
    """What a table holds; None of what is no table."""
    if type(value) in _TABLES and isinstance(value, (dict, list, set)):
        return value.copy() if value else ()
    return None


def _restore(have: dict[str, Any], attributes: dict[str, tuple[Any, Any]],
             changed: bool = False) -> None:
    for name in () if changed else have.keys() - attributes.keys():
        del have[name]
    for name, (value, entries) in attributes.items():
        have[name] = value
        if entries is not None and (entries or value):
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(entries)
