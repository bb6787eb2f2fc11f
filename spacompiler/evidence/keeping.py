"""Statistics as messages, so that a compile that was killed need not gather them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch

from ..system.messages import Message
from .scores import Scores
from .statistics import Covariance, Fluctuation, Moments

SMALL, LARGE = ("gates", "sums"), ("arrays", "curvature")
"""Sums of gradients by key: those kept in one entry each, and those whose arrays have their own."""


def entries(context: Scores) -> Iterator[tuple[str, Message]]:
    """Yield (name, what to keep) of all that a context has gathered."""
    for at, found in context._inputs.items():
        for kind, statistic in found.items():
            yield f"input {at} {kind}", [((at, kind), _state(statistic))]
    gradients = context.gradients
    if gradients is None:
        return
    yield "seen", [((gradients.batches, gradients.examples), [])]
    for home in SMALL:
        yield home, [((home, key), [value]) for key, value in getattr(gradients, home).items()]
    for home in LARGE:
        for key, value in getattr(gradients, home).items():
            yield f"{home} {key}", [((home, key), [value])]


def restore(context: Scores, name: str, message: Message) -> None:
    """Let a context have again what was kept under a name."""
    for key, tensors in message:
        if name.startswith("input "):
            at, kind = key
            context._inputs.setdefault(at, {})[kind] = _again(context, kind, tensors)
        elif name == "seen" and context.gradients is not None:
            context.gradients.batches, context.gradients.examples = key
        elif context.gradients is not None:
            home, own = key
            value = context.room.take(tensors[0]) if home == "curvature" else tensors[0].clone()
            getattr(context.gradients, home)[own] = value


def clear(context: Scores) -> None:
    """Let a context have gathered nothing."""
    context._inputs.clear()
    gradients = context.gradients
    if gradients is not None:
        gradients.batches = gradients.examples = 0
        for home in (*SMALL, *LARGE):
            getattr(gradients, home).clear()


def _state(statistic: Moments | Covariance | Fluctuation) -> list[torch.Tensor]:
    """The numbers of a statistic, in the order of its fields; where they lie is none of them."""
    return [torch.as_tensor(getattr(statistic, f.name)) for f in fields(statistic)
            if f.name != "room"]


def _again(context: Scores, kind: str, tensors: list[torch.Tensor] | Any) -> Any:
    """A statistic with these numbers."""
    made = context._statistic(kind)
    take: dict[str, Callable[[torch.Tensor], Any]] = {"count": int, "upper": context.room.take}
    for field, value in zip((f for f in fields(made) if f.name != "room"), tensors, strict=True):
        setattr(made, field.name, take.get(field.name, torch.clone)(value))
    return made
