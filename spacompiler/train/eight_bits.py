"""Frozen weights of linear layers in 8 bits while something beside them trains.

bitsandbytes holds each row of a weight as whole numbers of a scale of its own, and multiplies by
what they stand for, forward and backward. The weights themselves lie in a file meanwhile, and come
back bit for bit afterwards: what was trained is merged into these, not into what 8 bits left of
them, so that a network is never written with the error of its rounding.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpaError
from ..store.mapped import let_go
from ..store.room import Room
from ..system.process import at_level
from .ranks import pairs

EACH = 1 << 24
"""Bytes that are written before their memory is given back."""
ALIGNED = 64


def library() -> Any:
    """Import bitsandbytes; raises SpaError naming the extra where it is missing."""
    try:
        with at_level(("bitsandbytes",), logging.ERROR):  # it misses kernels that are not asked for
            import bitsandbytes
    except ImportError as problem:
        raise SpaError("weights in 8 bits need bitsandbytes, which is not installed",
                       why=str(problem), fix="pip install 'spacompiler[eight-bits]'") from problem
    return bitsandbytes


@cache
def _kind() -> Any:
    """The layer of the library, which computes in eval mode what it does in train mode.

    By itself it would round what it reads to 8 bits, too, wherever nothing trains: held-out text
    would be judged by another network than the one that trains.
    """
    class Held(library().nn.Linear8bitLt):  # type: ignore[misc]
        computes: torch.dtype  # in what its weight was, and its results are

        def train(self, mode: bool = True) -> Held:
            super().train(True)
            return self

    return Held


@contextmanager
def eight_bits(module: nn.Module) -> Iterator[int]:
    """Hold the frozen weights of a module's linear layers in 8 bits; gives how many there are.

    Afterwards the layers that were there are there again, their weights as they were.

    Raises:
        SpaError: bitsandbytes is not installed, no linear layer is frozen, or the disk is full.
    """
    layers = _frozen(module)
    if not layers:
        raise SpaError("no weight can be held in 8 bits", why="no linear layer is frozen",
                       fix="leave bits out")
    kind, aside = _kind(), _Aside([layer.weight for *_, layer in layers])
    device = layers[0][-1].weight.device
    try:
        for parent, name, layer in layers:
            setattr(parent, name, _held(kind, layer))
            aside.put(layer.weight)
        yield len(layers)
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)
            layer.weight.data = layer.weight.data.to(device, copy=True)


def _frozen(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers whose weight nobody trains or shares: what holds them, their names there.

    Those of adapters are none of them, even where a pass trains but what stands between.
    """
    tied = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    adapters = {id(part) for _, *both in pairs(module) for part in both}
    return [(parent, name, part) for parent in module.modules()
            for name, part in parent.named_children()
            if type(part) is nn.Linear and id(part) not in adapters
            and not part.weight.requires_grad
            and part.weight.is_floating_point() and tied.count(id(part.weight)) == 1
            and not part._forward_hooks and not part._forward_pre_hooks]


def _held(kind: Any, layer: nn.Linear) -> nn.Module:
    """Return a layer's twin in 8 bits, with its bias."""
    weight = layer.weight
    with torch.device("meta"):
        twin = kind(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False,
                    threshold=0.0)
    values = library().nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    twin.weight, twin.computes = values.to(weight.device), weight.dtype
    twin.register_parameter("bias", layer.bias)
    return twin


class _Aside:
    """A file that weights go to one after the other; what lies in it takes no memory."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        place, size = Path(tempfile.gettempdir()), sum(map(_room, weights))
        try:
            self._bytes = Room(place / "weights").empty([size], torch.uint8)
        except OSError as problem:
            raise SpaError("there is no room for the weights that 8 bits stand for",
                           where=str(place), why=f"{size / 1e6:,.0f} MB are needed: {problem}",
                           fix="set TMPDIR to a place that has it, or leave bits out") from problem
        self._at = self._kept = 0

    def put(self, weight: torch.Tensor) -> None:
        """Move the values of a weight."""
        part = self._bytes[self._at:self._at + weight.nbytes].view(weight.dtype)
        weight.data = part.view(weight.shape).copy_(weight.data)
        self._at += _room(weight)
        if self._at - self._kept >= EACH:
            let_go([self._bytes[self._kept:self._at]])
            self._kept = self._at


def _room(weight: torch.Tensor) -> int:
    """Bytes that a weight takes in the file, so that the next one starts at a whole number."""
    return -(-weight.nbytes // ALIGNED) * ALIGNED
