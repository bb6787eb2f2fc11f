"""Write a safetensors file array by array: no more of it is in memory than one array.

The library takes all arrays at once, and what it reads of files that are shown in memory stays
there. The form is its own: eight bytes of length, the places as JSON, then the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from .mapped import let_go

KINDS = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
         torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
         torch.uint32: "U32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
         torch.uint64: "U64"}
"""Types and their names, in the order in which arrays of them stand, the last first."""
_ORDER = {kind: i for i, kind in enumerate(KINDS)}


def write(arrays: Mapping[str, torch.Tensor], file: str | Path,
          metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays, byte for byte as `safetensors.torch.save_file` does.

    Arrays of types that are not known here are left to the library.
    """
    if any(t.dtype not in KINDS or t.device.type != "cpu" or not t.is_contiguous()
           for t in arrays.values()) or len({t.data_ptr() for t in arrays.values()}) < len(arrays):
        save_file(dict(arrays), file, metadata=None if metadata is None else dict(metadata))
        return
    order = sorted(arrays, key=lambda name: (-_ORDER[arrays[name].dtype], name.encode()))
    with Path(file).open("wb") as stream:
        stream.write(_head(arrays, order, metadata))
        for name in order:
            flat = arrays[name].detach().reshape(-1)
            stream.write(flat.view(torch.uint8).numpy().data)
            let_go([flat])


def _head(arrays: Mapping[str, torch.Tensor], order: list[str],
          metadata: Mapping[str, str] | None) -> bytes:
    places: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        array = arrays[name]
        places[name] = {"dtype": KINDS[array.dtype], "shape": list(array.shape),
                        "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(places, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
