"""Arrays of an artifact as safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import SpaError
from . import strict_json, tensors_file
from .folder import SAMPLE, load_arrays


def save_weights(path: Path, module: torch.nn.Module,
                 unsaved: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a module's parameters and buffers, tied ones once (with `tied` in the metadata).

    `unsaved` are further arrays: buffers that a state dict leaves out, and that were sliced.
    """
    first: dict[Any, str] = {}
    tensors, tied = {}, {}
    for name, tensor in sorted({**module.state_dict(), **(unsaved or {})}.items()):
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) \
            if tensor.numel() else name
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().contiguous()
    # one entry only: safetensors writes several in an order that changes from run to run
    tensors_file.write(tensors, path, {"tied": json.dumps(tied, sort_keys=True)})


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read arrays written by `save_weights`, tied names included; raises SpaError if damaged."""
    tensors, metadata = load_arrays(path)
    tied = strict_json.parse(metadata.get("tied", "{}"), {str: str}, path.name)
    if not tensors.keys() >= set(tied.values()):
        raise SpaError(f"{path.name} cannot be read", where=str(path.parent),
                       why="an array is tied to one that is not in the file")
    return {**tensors, **{name: tensors[other] for name, other in tied.items()}}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two arrays are of one type and one shape, and equal bit for bit.

    torch compares short floats one by one; here they are words of eight bytes.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, others = _words(one.detach()), _words(other.detach())
    if mine is None or others is None:
        return torch.equal(one, other)
    return all(torch.equal(*pair) for pair in zip(mine, others, strict=True))


def _words(array: torch.Tensor) -> list[torch.Tensor] | None:
    """The bits of an array as long integers and the bytes that are left; None if it lies apart."""
    if array.layout is not torch.strided or not array.is_contiguous() or not array.ndim \
            or array.storage_offset() * array.itemsize % 8 or array.data_ptr() % 8:
        return None
    flat = array.reshape(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    return [flat[:whole].view(torch.int64), flat[whole:]]


def save_check(path: Path, args: tuple[Any, ...], kwargs: Mapping[str, Any],
               results: list[torch.Tensor]) -> None:
    """Write the example inputs and a sample of each result, with the shapes of all."""
    tensors = {f"arg.{i}": a.contiguous() for i, a in enumerate(args)
               if isinstance(a, torch.Tensor)}
    tensors |= {f"kwarg.{k}": v.contiguous() for k, v in kwargs.items()
                if isinstance(v, torch.Tensor)}
    tensors |= {f"result.{i}": sample(r) for i, r in enumerate(results)}
    save_file(tensors, path, metadata={"results": json.dumps([list(r.shape) for r in results])})


def sample(result: torch.Tensor) -> torch.Tensor:
    """Return at most SAMPLE evenly spaced values of a result."""
    flat = result.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLE))].contiguous().clone()
