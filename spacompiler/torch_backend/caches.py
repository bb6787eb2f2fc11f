"""Networks run without caches of past keys and values: those serve generation alone.

A cache is a result that no program of tensors holds, so that it would keep a language model from
being traced. Its keyword is answered where `forward` has it; elsewhere the entry of the network's
configurations is off while the network runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

CACHE, PAST = "use_cache", "past_key_values"


def cacheless(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call that asks for no cache; one that brings its own stays."""
    takes = CACHE in inspect.signature(module.forward).parameters
    if kwargs.get(PAST) is not None or not (takes or CACHE in kwargs):
        return dict(kwargs)
    return {**kwargs, CACHE: False}


@contextmanager
def caches_off(module: nn.Module) -> Iterator[None]:
    """Switch `use_cache` off in every configuration that a network holds, and on again after."""
    found: dict[int, Any] = {}
    for part in module.modules():
        _collect(vars(part).get("config"), found)
    try:
        for config in found.values():
            setattr(config, CACHE, False)
        yield
    finally:
        for config in found.values():
            setattr(config, CACHE, True)


def _collect(config: object, found: dict[int, Any]) -> None:
    """Add a configuration that asks for caches, and those inside it, by their identities."""
    if not hasattr(config, "__dict__") or id(config) in found:
        return
    own = vars(config)
    if own.get(CACHE) is True:
        found[id(config)] = config
    for inner in own.values():
        if hasattr(inner, "to_dict"):
            _collect(inner, found)
