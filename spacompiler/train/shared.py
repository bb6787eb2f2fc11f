"""A step's batches dealt out to processes, which all take the same step.

Each runs its own batches and holds back their gradients; then all hear those of each batch in turn,
and add them up in the order of the batches. So every process has the sums that one alone would
have, bit for bit, and all else of a step (the optimiser, what a hook does) follows from these.

>>> from spacompiler.system.group import Team
>>> w = nn.Parameter(torch.ones(1))
>>> def run(number):
...     value = (w * (number + 1)).sum()
...     value.backward()
...     return value.item()
>>> summed(Team(), 3, run, {"w": w}), w.grad
(6.0, tensor([6.]))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..evidence.calls import Batch
from ..system.group import Team
from ..system.messages import Message
from .objective import call

Parameters = Mapping[str, nn.Parameter]


def summed(team: Team, count: int, run: Callable[[int], float], parameters: Parameters) -> float:
    """Leave the sum of the gradients of `count` batches on parameters, in every process.

    `run` goes forward and backward through the batch of a number, and returns a value; returns the
    sum of these.
    """
    total, sums = 0.0, dict[str, torch.Tensor]()
    for first in range(0, count, team.size):
        if team.size == 1:
            total += run(first)
            continue
        at = first + team.rank
        mine = _taken(run(at), parameters) if at < count else None
        for said in team.in_turn(mine, "a batch of a step"):
            for key, arrays in said or ():
                if isinstance(key, str):
                    _add(sums, key, parameters[key], *arrays)
                else:
                    total += key
    for name in sums:
        parameters[name].grad = sums[name]
    return total


def _taken(value: float, parameters: Parameters) -> Message:
    """A batch's value and gradients, which are on parameters no more."""
    made = [(value, []), *((n, [p.grad]) for n, p in parameters.items() if p.grad is not None)]
    for p in parameters.values():
        p.grad = None
    return made


def _add(sums: dict[str, torch.Tensor], name: str, p: nn.Parameter, more: torch.Tensor) -> None:
    """Add a gradient to a sum, laid out in memory as the parameter is: norms depend on that."""
    if name in sums:
        sums[name].add_(more.to(p.device))
    else:
        sums[name] = torch.empty_like(p, requires_grad=False).copy_(more)


Found = tuple[dict[str, Any], dict[str, torch.Tensor]]


def heard(team: Team, found: Found | None) -> Found | None:
    """Return what the first process found of an earlier run, facts and arrays, in all of them."""
    if team.size == 1:
        return found
    said = team.of_first(lambda: found and (found[0], list(found[1])), "the checkpoint")
    if said is None:
        return None
    arrays = dict[str, torch.Tensor]()
    for name in said[1]:
        mine: Message | None = [(name, [found[1][name]])] if found is not None else None
        for part in team.in_turn(mine, f"the checkpoint's {name}"):
            arrays |= {key: array for key, (array,) in part or ()}
    return said[0], arrays


def alike(team: Team, state: Mapping[str, torch.Tensor]) -> None:
    """Raise SpaError unless all processes have the same arrays."""
    if team.size > 1:
        said = [(name, int(_numbers(array).sum(dtype=torch.int64)))
                for name, array in state.items()]
        team.agree(hashlib.sha256(str(said).encode()).hexdigest(), "what is trained")


def _numbers(array: torch.Tensor) -> torch.Tensor:
    """The bits of an array as numbers."""
    flat = array.detach().contiguous().reshape(-1)
    return flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8)


def changing(module: nn.Module, batch: Batch) -> list[str]:
    """Return the buffers that a forward pass in train mode changes; they are as they were."""
    places = [(f"{path}.{name}".lstrip("."), part._buffers, name, buffer)
              for path, part in module.named_modules()
              for name, buffer in part._buffers.items() if buffer is not None]
    before = [buffer.clone() for *_, buffer in places]
    was, changed = module.training, []
    try:
        with torch.no_grad(), torch.random.fork_rng(()):
            call(module.train(), *batch)
    finally:
        module.train(was)
        for (path, table, name, buffer), value in zip(places, before, strict=True):
            now, table[name] = table[name], buffer
            if now is None or not torch.equal(_numbers(now), _numbers(value)):
                changed.append(path)
                buffer.copy_(value)
    return changed
