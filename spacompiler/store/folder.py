"""The artifact: a directory that appears whole or not at all, and that can be checked and loaded.

    model.safetensors  config.json  tokenizer …      weights (never pickle), stock layout if uniform
    model.onnx (+ model.onnx.data)                   for ONNX Runtime
    plan.json  recipe.json                           what was removed, what was asked
    check.safetensors                                example inputs and results, for `verify`
    report.json  report.md                           what changed, in numbers
    MANIFEST.json                                    sha256 of every file
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import SpaError, UsageError
from .place import MANIFEST, check_artifact, check_out

SAMPLE = 65536


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes `out` if all goes well and vanishes if not."""
    out = check_out(out)
    made = _missing_parents(out.absolute().parent)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as problem:
        raise UsageError(f"output {str(out)!r} cannot be made", why=str(problem)) from problem
    try:
        place.chmod(0o755)
        yield place
        check_out(out)
        place.rename(out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _missing_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    return missing


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, sort_keys=True, default=str) + "\n",
                    encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of an artifact; raises SpaError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise SpaError(f"{path.name} cannot be read", where=str(path.parent), why=str(problem),
                       fix="give a directory written by `spacompiler compile`") from problem


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file with its size and sha256."""
    files = {str(p.relative_to(folder)): {"sha256": sha256(p), "bytes": p.stat().st_size}
             for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST}
    write_json(folder / MANIFEST, {"files": files})


def check_manifest(folder: Path) -> list[str]:
    """Return what differs from the manifest, [] if nothing; raises SpaError if there is none."""
    check_artifact(folder)
    listed = read_json(folder / MANIFEST)["files"]
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - present)]
    wrong += [f"{name} is not listed" for name in sorted(present - listed.keys() - {MANIFEST})]
    wrong += [f"{name} was changed" for name in sorted(listed.keys() & present)
              if sha256(folder / name) != listed[name]["sha256"]]
    return wrong
