"""Inputs made up for an ONNX file, and the cases that are timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import SpaError, UsageError
from ..runtime.decoder import cache_names
from ..runtime.session import Arrays

LENGTH = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the free axes."""

    batch: int
    sequence: int
    past: int = 0


@dataclass(frozen=True)
class Case:
    """What is timed: `phase` is prefill, decode or whole; `inputs` of each file by its name."""

    name: str
    phase: str
    sizes: Sizes
    inputs: Mapping[str, Arrays]


def declared(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int | str, ...]]]:
    """Return type and shape of each input of a file, without reading its weights.

    Raises:
        SpaError: the file is missing or damaged, or an input is no tensor of known rank.
    """
    try:
        graph = ir.load(path).graph
        weights = set(graph.initializers)
        return {str(v.name): (v.dtype.numpy(), tuple(  # type: ignore[union-attr]
            d if isinstance(d, int) else str(d.value) for d in v.shape))  # type: ignore[union-attr]
                for v in graph.inputs if v.name not in weights}
    except Exception as problem:  # protobuf and onnx_ir raise their own kinds
        raise SpaError("the ONNX file cannot be read", where=str(path), why=str(problem),
                       fix="give a complete .onnx file whose inputs are tensors") from problem


def synthetic(path: Path, sizes: Sizes) -> dict[str, np.ndarray]:
    """Return made-up inputs of a file: normal numbers, masks of ones, positions, token 0."""
    generator = np.random.default_rng(0)
    made = {}
    for name, (dtype, shape) in declared(path).items():
        concrete = tuple(_size(name, axis, d, sizes) for axis, d in enumerate(shape))
        if np.issubdtype(dtype, np.floating):
            value = generator.standard_normal(concrete)
        elif "position" in name and len(concrete) > 1:
            value = np.broadcast_to(np.arange(sizes.past, sizes.past + concrete[-1]), concrete)
        else:
            value = np.full(concrete, int("mask" in name or dtype == np.bool_))
        made[name] = np.ascontiguousarray(value, dtype=dtype)
    return made


def _size(name: str, axis: int, symbol: int | str, sizes: Sizes) -> int:
    """The size of an axis: its own if it is fixed, else by where it stands and what it is called.
    """
    if isinstance(symbol, int):
        return symbol
    if axis == 0:
        return sizes.batch
    if "+" in symbol or "total" in symbol or name == "attention_mask":
        return sizes.past + sizes.sequence
    return sizes.past if "past" in symbol else sizes.sequence


def cases(paths: Mapping[str, Path], *, batches: Sequence[int] = (1, 8),
          length: int = LENGTH) -> list[Case]:
    """Return what to time for some files, which must be alike: all with a cache, or none.

    Files with a fixed batch are timed at that one.

    Raises:
        UsageError: files with and without a cache, or with different fixed batches.
    """
    inputs = [declared(path) for path in paths.values()]
    cached = {bool(cache_names(found)) for found in inputs}
    if len(cached) > 1:
        raise UsageError("a decoder with a cache cannot be compared with a file that has none",
                         fix="export both with --decoder, or both without")
    shapes = [shape for found in inputs for _, shape in found.values() if shape]
    fixed = sorted({shape[0] for shape in shapes if isinstance(shape[0], int)})
    if len(fixed) > 1:
        raise UsageError("the files have different fixed batch sizes", why=str(fixed),
                         fix="export them with a free batch axis")
    free = any(isinstance(d, str) for shape in shapes for d in shape[1:])
    return [Case(name, phase, sizes, {n: synthetic(p, sizes) for n, p in paths.items()})
            for batch in fixed or batches
            for phase, name, sizes in _phases(batch, length, cached == {True}, free)]


def _phases(batch: int, length: int, cached: bool, free: bool) -> list[tuple[str, str, Sizes]]:
    """The phases of one batch size, with their names."""
    if not cached:
        name = f"batch {batch}" + (f" × {length}" if free else "")
        return [("whole", name, Sizes(batch, length))]
    return [("prefill", f"prefill {batch} × {length}", Sizes(batch, length)),
            ("decode", f"decode {batch} × 1 after {length}", Sizes(batch, 1, length))]
