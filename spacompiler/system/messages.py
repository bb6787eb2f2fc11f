"""What processes say to each other: keys and arrays as bytes, by JSON and their own layout.

>>> import torch
>>> decoded(encoded([(("gates", 3), [torch.tensor([1.0, 2.0])])]))
[(('gates', 3), [tensor([1., 2.])])]
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import Any

import torch

Message = Sequence[tuple[Any, Sequence[torch.Tensor]]]
"""(key, arrays) in an order; keys are strings, numbers and tuples of them."""
ALIGNED = 64
"""Bytes that arrays begin at multiples of, as torch lays them out by itself."""


def encoded(message: Message) -> torch.Tensor:
    """Return a message as one array of bytes."""
    head = json.dumps([[key, [[str(t.dtype).removeprefix("torch."), list(t.shape)]
                              for t in tensors]] for key, tensors in message]).encode()
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensors in message
            for t in tensors]
    parts = [torch.tensor([len(head)]).view(torch.uint8),
             torch.frombuffer(bytearray(head), dtype=torch.uint8)]
    total = sum(map(_room, (sum(map(len, parts)), *map(len, flat))))
    made = torch.zeros(total, dtype=torch.uint8)
    torch.cat(parts, out=made[:sum(map(len, parts))])
    at = _room(sum(map(len, parts)))
    for part in flat:
        made[at:at + len(part)] = part
        at += _room(len(part))
    return made


def decoded(data: torch.Tensor) -> list[tuple[Any, list[torch.Tensor]]]:
    """Return the message that bytes hold; its arrays are parts of them."""
    length = int(data[:8].view(torch.int64))
    head = json.loads(data[8:8 + length].numpy().tobytes())
    at, made = _room(8 + length), []
    for key, kinds in head:
        tensors = []
        for name, shape in kinds:
            kind = getattr(torch, name)
            size = kind.itemsize * torch.Size(shape).numel()
            tensors.append(data[at:at + size].view(kind).reshape(shape))
            at += _room(size)
        made.append((_hashable(key), tensors))
    return made


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def _hashable(key: object) -> Hashable:
    return tuple(map(_hashable, key)) if isinstance(key, list) else key
