"""What the JSON files of an artifact may look like: one form a file (see `strict_json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..errors import SpaError


def _natural(data: object) -> bool:
    """Whole number from 0."""
    return type(data) is int and 0 <= data < 2**63


def _digest(data: object) -> bool:
    """Sha256 in hexadecimal digits."""
    return isinstance(data, str) and re.fullmatch(r"[0-9a-f]{64}", data) is not None


def _ascending(data: object) -> bool:
    """List of ascending positions."""
    return isinstance(data, list) and all(map(_natural, data)) and \
        all(a < b for a, b in pairwise(data))


def _nest(data: object) -> bool:
    """Nest of lists of ascending positions."""
    if isinstance(data, list) and data and all(isinstance(part, list) for part in data):
        return all(map(_nest, data))
    return _ascending(data)


def _attribute(data: object) -> bool:
    """List of a path, the name of an attribute of numbers and its value."""
    if not (isinstance(data, list) and len(data) == 3):
        return False
    path, name, value = data
    values = value if isinstance(value, list) else [value]
    return isinstance(path, str) and isinstance(name, str) and "__" not in name and \
        all(isinstance(x, int | float) for x in values)


def _file_name(data: object) -> bool:
    """Name of a file in the same directory."""
    return isinstance(data, str) and data not in ("", ".", "..") and not set(data) & set("/\\\0")


_STRUCTURE = {
    "layout": ("uniform", "per-layer", "any", "onnx"), "emission": ("module", "program", "graph"),
    "model": str, "class": str, "attributes": [_attribute], "trained?": bool, "dropped?": [str],
    "factored?": {str: _natural},
    "biased?": [str], "parts?": [str],
    "source?": {"kind": str, "unused?": [str]}, "source_sha256?": _digest, "opset?": {str: int},
    "inputs": {"args": _natural, "kwargs": [str], "constants": {str: object}}}
_SLICES = {
    "indices": {str: _ascending}, "arrays": {str: ("joint", [(None, str)])},
    "shapes?": {str: [_natural]}, "corrected": {str: {"factor": float, "offset": float}},
    "repaired?": [str], "trained?": [str], "weights_hash?": _digest}
_PLAN = {"kept": {str: _nest}, "sizes": {str: _natural}, "target?": str,
         "costs?": {str: {str: int}}, "weights_hash?": str, "recipe?": {str: object}}
FORMS: Mapping[str, Any] = {
    "MANIFEST.json": {"files": {str: {"sha256": _digest, "bytes": _natural}}},
    "structure.json": _STRUCTURE, "slices.json": _SLICES, "plan.json": _PLAN,
    "recipe.json": {"model": str}, "report.json": {str: object},
    "dense_config.json": {str: object}, "config.json": {str: object},
    "model.safetensors.index.json": {"weight_map": {str: _file_name}},
    "adapter_config.json": {str: object}, "spacompiler.json": {str: object}}


def check_slices(slices: Mapping[str, Any], where: str) -> None:
    """Raise SpaError unless every array's lists of positions are there and fit its shape."""
    shapes = slices.get("shapes", {})
    for name, axes in slices["arrays"].items():
        if axes == "joint":
            continue
        shape = shapes.get(name, [2**63] * len(axes))
        problem = "has another rank" if len(shape) != len(axes) else next(
            (f"has no list {key!r}" for key in axes
             if key is not None and key not in slices["indices"]), "") or next(
            (f"keeps positions beyond its dimension {d}" for d, key in enumerate(axes)
             if key is not None and max(slices["indices"][key], default=-1) >= shape[d]), "")
        if problem:
            raise SpaError("slices.json cannot be read", where=where, why=f"{name} {problem}",
                           fix="give a directory written by `spacompiler compile`")
