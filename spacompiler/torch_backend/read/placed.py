"""Call a module with other arrays in the places of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def called(module: nn.Module, held: Mapping[str, torch.Tensor], args: tuple[Any, ...],
           kwargs: dict[str, Any]) -> Any:
    """Return what a module gives with the tensors `held` under the full names of its own.

    Where a module does more as an attribute is set (a recurrent layer keeps a list of its
    weights), torch's own way is taken, which sets one after the other.
    """
    if any(type(part).__setattr__ is not nn.Module.__setattr__ for part in module.modules()):
        return torch.func.functional_call(module, dict(held), args, kwargs, tie_weights=False)
    with _in_place(module, held):
        return module(*args, **kwargs)


@contextmanager
def _in_place(module: nn.Module, held: Mapping[str, torch.Tensor]) -> Iterator[None]:
    kept = []
    for path, part in module.named_modules():
        for arrays in (part._parameters, part._buffers):
            if arrays:
                kept.append((arrays, dict(arrays)))
                arrays.update([(name, held[f"{path}.{name}" if path else name])  # type: ignore[misc]
                              for name, array in arrays.items() if array is not None])
    try:
        yield
    finally:
        for arrays, before in kept:
            arrays.clear()
            arrays.update(before)
