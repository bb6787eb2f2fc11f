"""Look at what sub-modules are given and give, while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

After = Callable[[str, nn.Module, Any, Any, Any], None]


@contextmanager
def watched(parts: Mapping[str, nn.Module], see: After) -> Iterator[None]:
    """Call `see(path, module, args, kwargs, result)` after each call of some modules.

    Hooks are gone afterwards, whatever went wrong.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with watched({"first": net[0]}, lambda path, *seen: print(path, tuple(seen[-1].shape))):
    ...     _ = net(torch.ones(1, 2))
    first (1, 3)
    """
    handles = [part.register_forward_hook(partial(_said, see, path), with_kwargs=True)
               for path, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _said(see: After, path: str, *seen: Any) -> None:
    see(path, *seen)
