"""What tells blocks apart that may do the same: classes, attributes, arrays and what is shared."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

DEPTH = 2
"""How far objects that blocks hold are looked into."""
MOST = 64
"""How many entries of one are looked at, the last ones."""
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_OWN = {*vars(nn.Module()), "forward"}


class Once(partial[Any]):
    """What stands in for a block's `forward` while it may be noted without being run."""


def signature(block: nn.Module,
               differing: Mapping[str, frozenset[str]] | None = None) -> tuple[Any, ...]:
    """What two blocks have in common that do the same, for each of their parts.

    Numbers count by their values only where it is known which of them `differing` ones are.
    """
    met: dict[int, int] = {}  # parts and arrays that stand in several places do so in both blocks
    return tuple([(name, type(part), met.setdefault(id(part), len(met)), _arrays(part, met),
                   _attributes(part, None if differing is None else
                               differing.get(name, frozenset())))
                  for name, part in block.named_modules(remove_duplicate=False)])


def _arrays(part: nn.Module, met: dict[int, int]) -> tuple[Any, ...]:
    return tuple((name, None if x is None else (x.shape, x.stride(), x.dtype,
                                                met.setdefault(id(x), len(met))))
                 for arrays in (part._parameters, part._buffers) for name, x in arrays.items())


def modes() -> tuple[object, ...]:
    """What decides, beside a block, which operators its code calls."""
    return torch.is_grad_enabled(), *[(torch.is_autocast_enabled(kind),
                                       torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]


def _attributes(part: nn.Module, but: frozenset[str] | None) -> tuple[Any, ...]:
    """Attributes by value where that is plain (numbers in `but`, or all, by type), else by
    identity."""
    if any(vars(part).get(name) for name in _HOOKS):
        return (id(part),)
    forward = vars(part).get("forward")
    return (part.training, None if isinstance(forward, Once) else id(forward), *[
        (name, type(x) if _is_number(x) and (but is None or name in but) else _valued(x))
        for name, x in vars(part).items() if name not in _OWN])


def _is_number(value: object) -> bool:
    return type(value) in (int, float, bool)


def _valued(value: object, depth: int = DEPTH) -> Any:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, tuple):
        return tuple([_valued(part, depth) for part in value])
    if type(value) in (list, dict, set) and not value:
        return type(value)
    return id(value), _within(value, depth - 1) if depth else None


def _within(value: Any, depth: int) -> Any:
    """What an object holds that blocks share: they may change it, and so may their parent."""
    if isinstance(value, (list, set, deque)):
        found = list(value)
    elif isinstance(value, dict):
        found = list(value.items())
    elif isinstance(value, (torch.Tensor, nn.Module, type)) or not hasattr(value, "__dict__"):
        return None
    else:
        found = list(vars(value).items())
    return len(found), *[_valued(part, depth) for part in found[-MOST:]]


def differing(blocks: list[nn.Module]) -> dict[str, frozenset[str]]:
    """The numbers that differ among blocks, by part."""
    found: dict[str, frozenset[str]] = {}
    for parts in zip(*[block.named_modules(remove_duplicate=False) for block in blocks],
                     strict=True):
        first = vars(parts[0][1])
        names = frozenset(name for name, x in first.items() if name not in _OWN and _is_number(x)
                          and any(vars(part)[name] != x for _, part in parts))
        if names:
            found[parts[0][0]] = names
    return found
