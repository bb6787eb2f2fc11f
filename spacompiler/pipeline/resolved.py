"""The recipe of a compile as it was carried out: what was left open, and which data was read.

Compiling again by it gives the same bytes: choices that depend on a machine or on what is installed
stand in it, files are named as they were given, with their hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import UsageError
from ..evidence.calibration import ORIGINS, Calibration
from ..request.profiles import profile
from ..request.recipe import Recipe
from ..request.recipe_file import GIVEN, WORDS
from ..stages.records import Request
from ..stages.spelled import spelled
from ..store.folder import sha256
from ..store.said import said
from ..torch_backend.machine import lanes

OPEN = ("importance", "allocation", "repair")
"""Options whose default, `auto`, stands for what suits the model and the data."""


def resolved(ask: Request, importance: object) -> Recipe:
    """Return the recipe with what was taken where it left something open.

    `importance` is the pass that scored.
    """
    asked = ask.recipe
    took: dict[str, Any] = {"importance": spelled("importance", importance, asked.importance),
            "allocation": spelled("allocation", ask.allocation, asked.allocation),
            "repair": "none" if ask.compensation is None else
            spelled("compensation", ask.compensation, asked.repair), **ask.calibration.taken}
    for option, found in (("schedule", ask.schedule), ("recovery", ask.recovery)):
        if found is not None:
            took[option] = spelled(option, found, getattr(asked, option))
    return dataclasses.replace(
        asked, **took, model=ask.model,
        automatic=tuple(n for n in OPEN if is_open(asked, n)),
        lanes=None if asked.align is not None else
        asked.lanes or profile(asked.runtime).lanes or lanes(),
        calibration=_word(ask.calibration, asked.calibration),
        recover_data=asked.recover_data if ask.recover_data is None or not asked.recover_data
        else _word(ask.recover_data, asked.recover_data),
        hashes=tuple(_hashes(ask)))


def is_open(recipe: Recipe, option: str) -> bool:
    """Whether an option was left to the compiler, now or when the recipe was written."""
    return getattr(recipe, option) == "auto" or option in recipe.automatic


def _word(data: Calibration, asked: str) -> str:
    """How a recipe asks for data again."""
    return _known_word(data) or asked or GIVEN


def _known_word(data: Calibration) -> str:
    """The word of data that is no file and was not handed over, or ""."""
    return next((word for word, origin in ORIGINS.items()
                 if data.origin == origin or data.origin.startswith(f"{origin},")), "")


# --- what was read ------------------------------------------------------------------------------


def _hashes(ask: Request) -> Iterator[str]:
    """Yield option=sha256 of data and adapters; data of words and of the model has none."""
    for option, data in (("calibration", ask.calibration), ("recover_data", ask.recover_data)):
        asked = getattr(ask.recipe, option)
        if data is not None and not _known_word(data) and (asked or data is ask.calibration):
            yield f"{option}={digest_of(data) if asked in WORDS else hash_of(asked)}"
    if ask.recipe.inputs:
        yield f"inputs={hash_of(ask.recipe.inputs)}"
    for i, path in enumerate(ask.recipe.adapters):
        yield f"adapters.{i}={hash_of(_place(path))}"


def _place(adapter: str) -> str:
    return adapter if Path(adapter).exists() else adapter.rpartition("=")[0]


def hash_of(path: str) -> str:
    """Return the sha256 of a file, or of the names and contents of a folder's."""
    place = Path(path)
    if not place.is_dir():
        return sha256(place) if place.is_file() else ""
    files = sorted(p for p in place.rglob("*") if p.is_file())
    return _sha(f"{p.relative_to(place).as_posix()} {sha256(p)}\n".encode() for p in files)


def digest_of(data: Calibration) -> str:
    """Return the sha256 of batches: names, kinds, shapes and numbers."""
    leaves = pytree.tree_leaves_with_path(list(data.batches))
    return _sha(part for path, leaf in leaves for part in (
        (f"{pytree.keystr(path)} {leaf.dtype} {tuple(leaf.shape)}".encode(),
         leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if isinstance(leaf, torch.Tensor) else (f"{pytree.keystr(path)} {said(leaf)}".encode(),)))


def _sha(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def check_hashes(recipe: Recipe) -> None:
    """Raise UsageError if data or an adapter is not the one that a recipe was carried out with."""
    if wrong := [each for each in recipe.hashes if "=" not in each]:
        raise UsageError(f"cannot read {wrong[0]!r} among the recipe's hashes",
                         fix="write OPTION=SHA256, or take it out of `hashes`")
    wanted = dict(each.split("=", 1) for each in recipe.hashes)
    named = {"inputs": recipe.inputs, "calibration": recipe.calibration,
             "recover_data": recipe.recover_data,
             **{f"adapters.{i}": _place(path) for i, path in enumerate(recipe.adapters)}}
    for option, path in named.items():
        if option not in wanted or path in WORDS:
            continue
        word = option.partition(".")[0]
        if (found := hash_of(path)) != wanted[option]:
            raise UsageError(
                f"{word} {path!r} is not what the recipe was carried out with",
                why=f"its sha256 is {found[:16]}…, in the recipe {wanted[option][:16]}…"
                if found else f"there is none, and it would have sha256 {wanted[option][:16]}…",
                fix=f"give that file by its path, or take {word} out of `hashes`")
