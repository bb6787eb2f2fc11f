"""Masks at consumers: the dense network in which removed slices read zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...axes.choices import Choices, keep_mask
from ...axes.expressions import ONE, atoms
from ...graph.idioms import base
from ...groups.solution import Solution
from ...plan.effects import touched
from .runner import Override, Reads


def masks(solution: Solution, choices: Choices) -> Reads:
    """Return reads through masks: removed slices read zero, those of scores minus infinity."""
    made: dict[tuple[str, int | None], torch.Tensor] = {}
    scores = {(r.node, r.tensor): r.dim for r in solution.solver.reads if r.how == "score"}

    def mask(name: str, dim: int | None) -> torch.Tensor:
        if (name, dim) not in made:
            dims = solution.solver.dims[name]
            found = keep_mask([e if dim in (None, d) else ONE for d, e in enumerate(dims)], choices)
            made[name, dim] = torch.from_numpy(found)
        return made[name, dim]

    def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
        dim = scores.get((node.name, name))
        gone = value.new_full((), 0 if dim is None else -torch.inf)
        return torch.where(_fit(mask(name, dim).to(value.device), value), value, gone)

    return Reads(touched(solution, choices), touch)


class Mixed(Exception):
    """What a node reads does not go example by example."""


def side_by_side(solution: Solution, each: Sequence[Reads]) -> Reads:
    """Return reads of as many examples as there are others, each by its own.

    They raise `Mixed` where examples cannot be told apart.
    """
    places: dict[str, set[str]] = {}
    for reads in each:
        for node, names in reads.places.items():
            places.setdefault(node, set()).update(names)

    def touch(node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
        tensor = solution.graph.tensors[name]
        if not value.ndim or len(value) != len(each) or tensor.static or 0 not in tensor.dynamic:
            raise Mixed(name)
        return torch.cat([reads.of(node, name, one)
                          for reads, one in zip(each, value.split(1), strict=True)])

    return Reads(places, touch)


def _fit(mask: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Masks are made for traced sizes; only dimensions with removed slices matter."""
    for d in range(mask.ndim):
        if mask.shape[d] > 1 and mask.shape[d] != value.shape[d]:
            mask = mask.narrow(d, 0, 1)
    return mask


def norms(solution: Solution, choices: Choices) -> dict[str, Override]:
    """Return, by node, norms whose statistics are to be taken over kept slices only (those of an
    RMSNorm with a gain are not: its gain and eps make up for the change)."""
    made: dict[str, Override] = {}
    nodes = {node.name: node for node in solution.graph.nodes}
    for read in solution.solver.reads:
        inexact = read.how == "norm" and read.node not in solution.solver.norms
        masked = _MASKED.get(base(nodes[read.node].op)) if inexact else None
        e = solution.solver.dims[read.tensor][read.dim]
        if masked is not None and set(atoms(e)) & set(choices):
            made[read.node] = masked(torch.from_numpy(keep_mask([e], choices)))
    return made


def _masked_layer_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x = args[0]
        gain, bias = (*args[2:4], None, None)[:2]
        eps = args[4] if len(args) > 4 else kwargs.get("eps", 1e-5)
        at, zero = mask.to(x.device), x.new_zeros(())
        kept = torch.where(at, x, zero)
        n = at.sum()
        mean = kept.sum(-1, keepdim=True) / n
        centred = torch.where(at, x - mean, zero)
        y = centred * torch.rsqrt(centred.square().sum(-1, keepdim=True) / n + eps)
        y = y * gain if gain is not None else y
        return y + bias if bias is not None else y

    return run


def _masked_group_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, groups, gain, bias, eps = (*args, *(None,) * 3)[:5]
        eps = kwargs.get("eps", 1e-5) if eps is None else eps
        zero = x.new_zeros(())
        shape = (1, -1, *[1] * (x.ndim - 2))
        kept = mask.to(x.device).reshape(shape).expand_as(x).unflatten(1, (groups, -1)).flatten(2)
        values = x.unflatten(1, (groups, -1)).flatten(2)
        n = kept.sum(2, keepdim=True).clamp(min=1)
        mean = torch.where(kept, values, zero).sum(2, keepdim=True) / n
        centred = torch.where(kept, values - mean, zero)
        variance = centred.square().sum(2, keepdim=True) / n
        y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
        y = y * gain.reshape(shape) if gain is not None else y
        return y + bias.reshape(shape) if bias is not None else y

    return run


def _masked_rms_norm(mask: torch.Tensor) -> Override:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        x, _, gain, eps = (*args, None, None)[:4]
        kept = torch.where(mask.to(x.device), x, x.new_zeros(()))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        y = kept * torch.rsqrt(kept.square().sum(-1, keepdim=True) / mask.sum() + eps)
        return y if gain is None else y * gain

    return run


_MASKED = {"layer_norm": _masked_layer_norm, "group_norm": _masked_group_norm,
           "rms_norm": _masked_rms_norm}
