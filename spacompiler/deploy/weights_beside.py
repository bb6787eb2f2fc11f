"""Let an ONNX file read its weights from the safetensors files that lie beside it.

A safetensors file is a header (8 bytes of length, then JSON with the place of each array) followed
by plain little-endian arrays: what ONNX calls external data. So one copy of the weights serves
both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from safetensors import safe_open

_TRIES = 4


class Place(NamedTuple):
    """Where an array's bytes stand in a file."""

    file: Path
    name: str
    offset: int
    length: int


def places(file: Path) -> dict[str, Place]:
    """Return the places of all arrays of a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = Place(file, name, 8 + size + start, end - start)
    return found


def refer_to_safetensors(model: ir.Model, files: Sequence[Path], limit: int) -> bool:
    """Point a model's weights at bit-equal arrays of safetensors files in its folder.

    An array is looked for under the weight's name, with or without leading parts, then among a few
    of its size. Nothing changes, and False is returned, if more than `limit` bytes of weights
    would have to stay elsewhere.
    """
    known = {name: place for file in files for name, place in places(file).items()}
    found, rest = {}, 0
    for name, value in model.graph.initializers.items():
        place = _equal(name, value, known)
        if place is None:
            rest += value.const_value.nbytes if value.const_value is not None else 0
        else:
            found[name] = place
    if rest > limit or not found:
        return False
    for name, place in found.items():
        value = model.graph.initializers[name]
        value.const_value = ir.ExternalTensor(
            place.file.name, place.offset, place.length, value.dtype,  # type: ignore[arg-type]
            shape=value.shape, name=name, base_dir=place.file.parent)  # type: ignore[arg-type]
    return True


def _equal(name: str, value: ir.Value, known: dict[str, Place]) -> Place | None:
    """The place of an array with the weight's bits: under its name, else (tied ones) any other."""
    raw: Any = getattr(value.const_value, "raw", None)
    if not isinstance(raw, torch.Tensor):
        return None
    named = sorted(known, key=lambda n: not (name == n or name.endswith(f".{n}")))
    first = [known[n] for n in named if known[n].length == raw.nbytes]
    return next((place for place in first[:_TRIES] if _same(raw, place)), None)


def _same(raw: torch.Tensor, place: Place) -> bool:
    with safe_open(place.file, "pt") as arrays:
        stored = arrays.get_tensor(place.name)
    return stored.dtype == raw.dtype and stored.shape == raw.shape and torch.equal(stored, raw)
