"""Check an artifact again from its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..errors import SpaError, WeightsError
from ..process import alone
from ..store import folder as artifact
from .check import Check
from .load import load_folder
from .torch_checks import _identity, _onnx, _reload


@alone()
def verify(folder: str | Path, model: nn.Module | None = None) -> list[Check]:
    """Return the checks of an artifact, in order; the first failing hash stops the rest.

    Raises SpaError if there is no artifact to check.
    """
    return list(checks(Path(folder), model))


def checks(folder: Path, model: nn.Module | None = None) -> Iterator[Check]:
    """Yield checks as they are done."""
    wrong = artifact.check_manifest(folder)
    yield Check("hashes", not wrong, "; ".join(wrong[:3]) or "every file is as written")
    if wrong:
        return
    structure = artifact.read_json(folder / "structure.json")
    if structure["layout"] == "onnx":
        from .onnx_checks import checks as of_file

        yield from of_file(folder, structure, model)
        return
    try:
        module = load_folder(folder, model)
    except SpaError as problem:
        yield Check("reload", False if problem.what.startswith("model")
                    or isinstance(problem, WeightsError) else None,
                    f"{problem.what}: {problem.why}")
        return
    yield _reload(folder, structure, module)
    yield _identity(folder, structure, module, model)
    yield _onnx(folder, structure, module)
