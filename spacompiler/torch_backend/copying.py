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

_STOCK = {"__reduce_ex__": object, "__reduce__": object, "__getstate__": object, "__new__": object,
          "__setstate__": nn.Module}
"""What says how a module is copied, and the class that it is of in stock modules."""
_SAID = ("__deepcopy__", "__getnewargs__", "__getnewargs_ex__")


def copied(module: M, memo: dict[int, Any] | None = None) -> M:
    """Return a deep copy of a module; `memo` says what takes the place of which object, by id."""
    made: M = _copied(module, {} if memo is None else memo)
    return made


def _copied(value: object, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
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
    if not _is_stock(kind) or "__deepcopy__" in vars(value):
        return copy.deepcopy(value, memo)
    twin: Any = kind.__new__(kind)
    memo[id(value)] = twin
    twin.__setstate__({name: _copied(part, memo) for name, part in vars(value).items()})
    return twin


@cache
def _is_stock(kind: type) -> bool:
    """Whether a class is one of modules, and nothing but `nn.Module` says how they are copied."""
    return issubclass(kind, nn.Module) and kind not in copyreg.dispatch_table \
        and not any(vars(base).get("__slots__") for base in kind.__mro__) \
        and all(getattr(kind, name) is getattr(home, name) for name, home in _STOCK.items()) \
        and not any(hasattr(kind, name) for name in _SAID)
