"""The artifact: a directory that appears whole or not at all, and that can be checked and loaded.

    model.safetensors  config.json  tokenizer …      weights (never pickle), stock layout if uniform
    model.onnx (+ model.onnx.data)                   for ONNX Runtime
    plan.json  recipe.yaml  recipe.json              what was removed, what was asked
    check.safetensors                                example inputs and results, for `verify`
    report.html  report.md  report.json  README.md   what changed, in pictures and numbers
    MANIFEST.json                                    sha256 of every file
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import SpaError, UsageError
from ..system.staging import Scratch, orderly, settle, sync, told
from . import strict_json
from .forms import FORMS, check_slices
from .place import MANIFEST, check_artifact, check_out
from .said import said

SAMPLE = 65536


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `out` if all goes well and vanishes if not."""
    out = check_out(out)
    parent = out.absolute().parent
    made = _missing_parents(parent)
    with orderly(), _emptied(made), told(f"the artifact {str(out)!r}", parent):
        try:
            parent.mkdir(parents=True, exist_ok=True)
            scratch = Scratch(parent, out.name)
        except OSError as problem:
            raise UsageError(f"output {str(out)!r} cannot be made", why=str(problem)) from problem
        with scratch as place:
            yield place
            check_out(out)
            settle(place)
            place.rename(out)
            for folder in (parent, *(m.parent for m in made)):
                sync(folder)


@contextmanager
def _emptied(made: Sequence[Path]) -> Iterator[None]:
    """Remove directories that the block leaves empty if it fails."""
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _missing_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    return missing


def write_json(path: Path, data: object) -> None:
    """Write data as JSON, keys in order; objects become their repr."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True, default=said) + "\n",
                    encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of an artifact; raises SpaError if it is missing, damaged or another form.
    """
    return strict_json.read(path, FORMS.get(path.name, object),
                            fix="give a directory written by `spacompiler compile`")


def read_slices(folder: Path) -> dict[str, Any]:
    """Read how arrays were cut; raises SpaError also where lists and shapes do not fit."""
    slices: dict[str, Any] = read_json(folder / "slices.json")
    check_slices(slices, str(folder))
    return slices


def load_arrays(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file with its metadata; raises SpaError if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            # clones are aligned as torch aligns: kernels then round as they did before saving
            tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as problem:  # safetensors raises its own kinds
        raise SpaError(f"{path.name} cannot be read", where=str(path.parent),
                       why=str(problem)) from problem


def load_check(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[int]] | None]:
    """Read what `save_check` wrote: arrays, and the shapes of results if they were recorded.

    Raises SpaError if the file is damaged.
    """
    tensors, metadata = load_arrays(folder / "check.safetensors")
    shapes = metadata.get("results")
    return tensors, None if shapes is None else \
        strict_json.parse(shapes, [[int]], "check.safetensors", where=str(folder))


def sha256(path: Path) -> str:
    """Return the hash of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file with its size and sha256."""
    files = {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
             for name in sorted(_entries(folder)[0]) if name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path) -> list[str]:
    """Return what differs from the manifest, [] if nothing; raises SpaError if there is none.

    Whatever is no regular file in a directory with files differs: links, pipes, empty directories.
    """
    check_artifact(folder)
    listed = read_json(folder / MANIFEST)["files"]
    present, wrong = _entries(folder)
    wrong += [f"{name} is missing" for name in sorted(listed.keys() - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - listed.keys() - {MANIFEST})]
    wrong += [f"{name} was changed" for name in sorted(listed.keys() & present)
              if (folder / name).stat().st_size != listed[name]["bytes"] or
              sha256(folder / name) != listed[name]["sha256"]]
    return [text.encode(errors="backslashreplace").decode() for text in wrong]


def check_hashes(folder: Path) -> None:
    """Raise SpaError unless every file of an artifact is as it was written."""
    wrong = check_manifest(folder)
    if wrong:
        raise SpaError("the artifact is damaged", where=str(folder), why="; ".join(wrong[:3]),
                       fix="copy it again, or compile the model again")


def _entries(folder: Path) -> tuple[set[str], list[str]]:
    """The files of a directory by their paths in it, and what has no place in an artifact."""
    files: set[str] = set()
    odd: list[str] = []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        entries = sorted(os.scandir(place), key=lambda e: e.name)
        if not entries and place != folder:
            odd.append(f"{place.relative_to(folder).as_posix()} is an empty directory")
        for entry in entries:
            name = Path(entry.path).relative_to(folder).as_posix()
            if entry.is_symlink():
                odd.append(f"{name} is a link")
            elif entry.is_dir():
                waiting.append(Path(entry.path))
            elif entry.is_file():
                files.add(name)
            else:
                odd.append(f"{name} is no regular file")
    return files, odd
