"""A module on a device for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..evidence.where import CPU, Where


@contextmanager
def there(module: nn.Module, where: Where, *, trained: bool = False) -> Iterator[None]:
    """Have a module's arrays on a device; afterwards it has its own again.

    Where it is `trained` these take the values that they were given there, and what was put on the
    module meanwhile comes to the processor. Arrays that are tied stay so.
    """
    if where.local:
        yield
        return
    own: dict[int, torch.Tensor] = {}
    moved: dict[int, torch.Tensor] = {}

    def go(array: torch.Tensor) -> torch.Tensor:
        if id(array) not in moved:
            made = moved[id(array)] = _like(array, array.detach().to(where.device))
            own[id(made)] = array
        return moved[id(array)]

    def back(array: torch.Tensor) -> torch.Tensor:
        if id(array) not in own:
            own[id(array)] = _like(array, array.detach().to(CPU))
        elif trained:
            own[id(array)].data = array.detach().to(CPU)
        return own[id(array)]

    _each(module, go)
    try:
        yield
    finally:
        _each(module, back)


def _like(array: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values as a parameter or buffer, as an array is one."""
    return nn.Parameter(values, array.requires_grad) if isinstance(array, nn.Parameter) else values


def _each(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, array in table.items():
                if array is not None:
                    table[name] = change(array)  # type: ignore[assignment]
