"""Mixtures of experts that loop over those which tokens chose are traced as one grouped product.

Such a loop asks data how often to run, which no trace answers; the same layers compute the same
by products in groups, if their configuration says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_LOOP, _GROUPED = "eager", "grouped_mm"
_ENTRY = "_experts_implementation_internal"


@contextmanager
def experts_in_groups(module: nn.Module) -> Iterator[None]:
    """Have experts that loop computed in groups meanwhile, whatever configuration says so."""
    configs: dict[int, Any] = {}
    for part in module.modules():
        _collect(vars(part).get("config"), configs)
    try:
        for config in configs.values():
            setattr(config, _ENTRY, _GROUPED)
        yield
    finally:
        for config in configs.values():
            setattr(config, _ENTRY, _LOOP)


def _collect(config: object, found: dict[int, Any]) -> None:
    """Add a configuration that asks for a loop, and those inside it, by their identities."""
    if not hasattr(config, "__dict__") or id(config) in found:
        return
    own = vars(config)
    if own.get(_ENTRY) == _LOOP:
        found[id(config)] = config
    for inner in own.values():
        if hasattr(inner, "to_dict"):
            _collect(inner, found)
