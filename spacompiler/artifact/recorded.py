"""What an artifact recorded of results and of cuts, and how it is held against what is there now.

Torch modules and ONNX files are checked by the same functions: arrays are tensors or numpy's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import SpaError
from ..groups.solution import Solution
from ..plan.plan import Plan
from ..stages.comparison import Comparison, compare
from ..store.arrays import sample
from ..store.folder import load_check, read_json
from .cuts import cuts

Array = TypeVar("Array", torch.Tensor, np.ndarray)


def recorded(folder: Path, got: list[torch.Tensor]) -> Comparison:
    """Compare results with those that an artifact recorded (samples of them)."""
    stored, shapes = load_check(folder)
    if shapes is None:  # written before shapes were recorded: floating results alone
        wanted = [n for n in stored if n.startswith("result.")]
        have = {n: sample(got[i]) for n in wanted
                for i in [int(n.removeprefix("result."))] if i < len(got)}
        return compare(have, {n: stored[n] for n in wanted})
    found = [list(r.shape) for r in got]
    if found != shapes:
        return Comparison(np.inf, np.inf, f"results of shapes {found} for {shapes}")
    return compare({f"result.{i}": sample(r) for i, r in enumerate(got)},
                   {n: t for n, t in stored.items() if n.startswith("result.")})


def selected(array: Array, slices: Mapping[str, Any], key: str) -> Array:
    """Return the part of a dense array (a tensor or numpy's) that its recorded cut keeps.

    Raises SpaError if the cut does not fit the array.
    """
    for dim, index in enumerate(slices["arrays"].get(key, ())):
        if index is not None:
            positions = slices["indices"][index]
            if dim >= array.ndim or max(positions, default=-1) >= array.shape[dim]:
                raise SpaError(f"the recorded cut of {key} does not fit the dense array",
                               why=f"dimension {dim} of shape {tuple(array.shape)}")
            array = array[(slice(None),) * dim + (positions,)]
    return array


def parts(have: Mapping[str, Any], dense: Mapping[str, Any], slices: Mapping[str, Any]
          ) -> Iterator[tuple[str, str]]:
    """Yield (array, problem): "" where it is the exact recorded part of the dense one.

    Gains are corrected by their recorded factors. Repaired and trained arrays have the shape of
    the part, and finite values; joint cuts are not a part of each dimension by itself.
    """
    changed = {*slices.get("repaired", ()), *slices.get("trained", ())}
    for key, array in have.items():
        if slices["arrays"].get(key) == "joint":
            continue
        if key not in dense:
            yield key, "no array of the dense network has that name"
            continue
        want = selected(dense[key], slices, key)
        if key in slices["corrected"]:
            factor, offset = (slices["corrected"][key][k] for k in ("factor", "offset"))
            want = _cast((_double(want) + offset) * factor - offset, want)
        if key in changed:
            fits = tuple(array.shape) == tuple(want.shape) and _is_finite(array)
            yield key, "" if fits else "it has another shape than the plan gives, or is not finite"
        else:
            yield key, "" if _equal(array, want) else "not the recorded part of the dense array"


def _double(array: Array) -> Array:
    return array.double() if isinstance(array, torch.Tensor) else array.astype(np.float64)


def _cast(array: Array, like: Array) -> Array:
    return array.to(like.dtype) if isinstance(array, torch.Tensor) else array.astype(like.dtype)


def _equal(one: Array, other: Array) -> bool:
    if one.dtype != other.dtype or tuple(one.shape) != tuple(other.shape):
        return False
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other)


def _is_finite(array: Array) -> bool:
    if isinstance(array, torch.Tensor):
        return not array.is_floating_point() or bool(torch.isfinite(array).all())
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def claims(folder: Path, structure: Mapping[str, Any], slices: Mapping[str, Any],
           plan: Plan) -> str:
    """Return "" if the files agree on what was done, else what speaks against what."""
    recipe = read_json(folder / "recipe.json")
    if structure.get("trained") and not (recipe.get("recovery") or recipe.get("schedule")):
        return "arrays are said to be trained, and the recipe trains nothing"
    if slices.get("trained") and not structure.get("trained"):
        return "slices.json names trained arrays, and structure.json says that none are"
    if slices.get("repaired") and recipe.get("repair") == "none" and not recipe.get("schedule"):
        return "arrays are said to be repaired, and the recipe repairs nothing"
    if not recipe.get("keep_adapter") and \
            slices.get("weights_hash", plan.weights_hash) != plan.weights_hash:
        return "plan.json and slices.json are of different weights"
    return ""


def planned(plan: Plan, slices: Mapping[str, Any], solution: Solution,
            tied: Mapping[str, str]) -> str:
    """Return "" if the recorded cuts are those that a plan makes of a network, else a difference.

    A plan that is not one of this network at all differs from it.
    """
    try:
        want = cuts(solution, plan.choices(solution), tied)
    except SpaError as problem:
        return problem.what
    for kind in ("arrays", "corrected"):
        for key in sorted(want[kind].keys() | slices[kind].keys()):
            one, other = (_resolved(s, kind, key) for s in (want, slices))
            if one != other:
                return f"slices.json and plan.json cut {key} differently"
    return ""


def _resolved(slices: Mapping[str, Any], kind: str, key: str) -> Any:
    """How an array is cut, with its lists in place of their names."""
    entry = slices[kind].get(key)
    return [None if i is None else slices["indices"][i] for i in entry] \
        if isinstance(entry, list) else entry
