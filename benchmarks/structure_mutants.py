"""Valid inputs changed in one place: JSON, safetensors, ONNX files, directories of them.

A change keeps a file's own form wherever it can, so that readers get past their first check: a
number becomes another number, a name another name, a shape's bytes still fill the file.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_fuzz

Random = random.Random
TRAP = "spa_trap_module"
OUTSIDE = "../outside.safetensors"
NUMBERS = (-2**63, -1, 0, 1, 2, 3, 7, 127, 2**15, 2**31, 2**40, 2**62, 10**30, 0.5, -0.5, 1e-300,
           1e300)
NAMES = (f"{TRAP}:factory", f"{TRAP}.Model", f"{TRAP}.py:factory", "os:getcwd", "someone/model",
         "http://localhost:1/x", "/etc/passwd", OUTSIDE, "./here", "zoo:../x", "zoo:mlp", "", ".",
         "a\0b", "x" * 5000, "[red]", "{0}", "%s", "__class__", "forward", "none", "auto",
         "\ud800", "é")
VALUES = (None, True, False, [], {}, [[]], [None], {"": None}, "x", 1, -1)


# --- JSON -----------------------------------------------------------------------------------------


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside of JSON data."""
    items = data.items() if isinstance(data, dict) else \
        enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def drawn_place(data: Any, rng: Random) -> tuple[Any, ...]:
    """Draw a place level by level, so that long lists do not take all."""
    path: tuple[Any, ...] = ()
    while isinstance(data, (dict, list)) and data and (not path or rng.random() < 0.8):
        key = rng.choice(sorted(data)) if isinstance(data, dict) else rng.randrange(len(data))
        path, data = (*path, key), data[key]
    return path


def json_text(text: str, rng: Random) -> str:
    """Change one place of a JSON text."""
    data = json.loads(text)
    path = drawn_place(data, rng)
    if not path:
        return json.dumps(rng.choice(VALUES))
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    what = rng.random()
    if what < 0.72:
        holder[key] = another(holder[key], data, rng)
    elif what < 0.82:
        del holder[key]
    elif what < 0.9 and isinstance(holder, dict):
        holder[rng.choice([*NAMES[:12], *holder])] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[rng.choice(NAMES)] = rng.choice(VALUES)
    else:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    return json.dumps(data)


def another(value: Any, data: Any, rng: Random) -> Any:
    """Return another value, mostly of the same type."""
    if rng.random() < 0.12:
        return rng.choice(VALUES)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([*NUMBERS, value + 1, value - 1, -value, value * 2])
    if isinstance(value, str):
        others = [v for p in places(data) for v in [_at(data, p)] if isinstance(v, str)]
        return rng.choice([*NAMES, *rng.sample(others, min(9, len(others))), value[::-1]])
    if isinstance(value, list) and value:
        return rng.choice([value[::-1], value[1:], value * 2, sorted(value, key=str), [value],
                           value[:1], [*value, value[-1]]])
    if isinstance(value, dict) and value:
        return rng.choice([{}, {**value, rng.choice(NAMES): next(iter(value.values()))},
                           [*value], dict(zip(value, [*value.values()][::-1], strict=True))])
    return rng.choice(VALUES)


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


# --- safetensors ----------------------------------------------------------------------------------

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64")


def safetensors(data: bytes, rng: Random) -> bytes:
    """Change one entry of the header, or some values; the sizes of the rest still agree."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8:8 + length]), bytearray(data[8 + length:])
    names = sorted(n for n in header if n != "__metadata__")
    name = rng.choice(names)
    entry = header[name]
    rng.choice((_values, _values, _renamed, _reshaped, _retyped, _swapped, _gone, _metadata,
                _broken))(header, body, name, entry, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def _values(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    begin, end = entry["data_offsets"]
    if begin == end:
        return
    at = begin + 4 * rng.randrange(max(1, (end - begin) // 4))
    value = rng.choice((float("nan"), float("inf"), 0.0, 1e38, -1.0))
    for place in ((at,) if rng.random() < 0.6 else range(begin, end - 3, 4)):
        body[place:place + 4] = struct.pack("<f", value)


def _renamed(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    header[rng.choice([f"{name}x", name.replace(".", "_"), *NAMES])] = header.pop(name)


def _reshaped(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    shape = entry["shape"]
    entry["shape"] = rng.choice([shape[::-1], [1, *shape], [*shape, 1], shape[1:] + shape[:1],
                                 [_product(shape)], [*shape, 0]])


def _retyped(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    """Another type of as many bytes, or of half as many in twice the last dimension."""
    same = {"F32": ("I32", "U32"), "I64": ("F64",), "F64": ("I64",)}.get(entry["dtype"], ())
    if same and rng.random() < 0.5:
        entry["dtype"] = rng.choice(same)
    elif entry["shape"] and entry["dtype"] == "F32":
        entry["dtype"], entry["shape"] = rng.choice(("F16", "BF16")), [*entry["shape"][:-1],
                                                                      entry["shape"][-1] * 2]
    else:
        entry["dtype"] = rng.choice(DTYPES)


def _swapped(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    other = rng.choice(sorted(n for n in header if n != "__metadata__"))
    header[name], header[other] = header[other], header[name]


def _gone(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    """Take an array away, its bytes too."""
    begin, end = header.pop(name)["data_offsets"]
    del body[begin:end]
    for key, other in header.items():
        if key != "__metadata__" and other["data_offsets"][0] >= end:
            other["data_offsets"] = [n - (end - begin) for n in other["data_offsets"]]


def _metadata(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    found = header.setdefault("__metadata__", {})
    key = rng.choice([*found, "tied", "results", "format", "lora_adapter_metadata"])
    found[key] = rng.choice(["{}", "[]", "[[2, 4]]", '{"a": "b"}', f'{{"{name}": "zz"}}', "[" * 99,
                             "null", "1", "pt", "tf", *NAMES[:3]])


def _broken(header: dict, body: bytearray, name: str, entry: dict, rng: Random) -> None:
    entry[rng.choice(("data_offsets", "shape"))] = [rng.choice((0, 4, 2**40, 2**63)) for _ in "ab"]


def _product(shape: list[int]) -> int:
    found = 1
    for n in shape:
        found *= n
    return found


# --- files and directories ------------------------------------------------------------------------


def onnx_bytes(data: bytes, rng: Random) -> bytes:
    """Change one field of an ONNX file."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(9):
        try:
            rng.choice(onnx_fuzz.FIELDS)(model, rng)
            break
        except Exception:
            continue  # the protobuf itself refuses
    return model.SerializeToString()


def _json_bytes(data: bytes, rng: Random) -> bytes:
    return json_text(data.decode(), rng).encode()


CHANGES: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": _json_bytes, ".safetensors": safetensors, ".onnx": onnx_bytes}


def change(folder: Path, rng: Random, spared: tuple[str, ...] = ()) -> str:
    """Change one file of a directory in one place, and say which."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in CHANGES and p.name not in spared)
    file = rng.choice(files)
    name = file.relative_to(folder).as_posix()
    if len(files) > 1 and rng.random() < 0.04:
        other = rng.choice(files)
        file.unlink() if other == file else shutil.copy(other, file)
        return f"{name} is {'gone' if other == file else other.name}"
    file.write_bytes(CHANGES[file.suffix](file.read_bytes(), rng))
    return name
