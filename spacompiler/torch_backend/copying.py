"""Copies of modules, as `copy.deepcopy` makes them, in a fraction of its time.

Most of what stock modules hold are plain values and empty tables (of hooks), and to copy these
takes deepcopy most of its time. What says itself how it is copied, and all that is no module, is
left to deepcopy, with the same memo.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
_TABLES = frozenset((dict, OrderedDict, set, list))


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy of a module; `memo` says what takes the place of which object, by id."""
    made: M = _copied(module, {} if memo is None else memo)
    return made


def _copied(value: object, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind in _TABLES and not value:
        memo[id(value)] = made = kind()
        return made
    if kind is dict and isinstance(value, dict):
        memo[id(value)] = made = {}
        for key, part in value.items():
            made[_copied(key, memo)] = _copied(part, memo)
        return made
    if not issubclass(kind, nn.Module) or not _is_stock(kind) or "__deepcopy__" in vars(value):
        return copy.deepcopy(value, memo)
    memo[id(value)] = made = kind.__new__(kind)
    made.__setstate__({name: _copied(part, memo) for name, part in vars(value).items()})
    return made


@cache
def _is_stock(kind: type) -> bool:
    """Whether nothing but `nn.Module` says how a class of modules is copied."""
    return not hasattr(kind, "__deepcopy__") and kind not in copyreg.dispatch_table \
        and kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__ \
        and getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None) \
        and kind.__setstate__ is nn.Module.__setstate__ and kind.__new__ is object.__new__ \
        and not any(hasattr(kind, name) for name in ("__getnewargs__", "__getnewargs_ex__")) \
        and not copyreg._slotnames(kind)  # type: ignore[attr-defined]
