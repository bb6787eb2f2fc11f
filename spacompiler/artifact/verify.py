"""Check an artifact again from its files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..store.folder import check_manifest, read_json
from ..system.process import alone
from .check import Check
from .load import load_folder
from .torch_checks import exported, modelling, plan_identity, reloaded, tried


@alone()
def verify(folder: str | Path, model: nn.Module | str | None = None) -> list[Check]:
    """Return the checks of an artifact, in order; the first failing hash stops the rest.

    `model` is the dense network, or its name as for `compile`. Without it, what the artifact
    records is followed only to the zoo and to transformers' own classes: other checks of the plan
    are not done.

    Raises SpaError if there is no artifact to check.
    """
    return list(checks(Path(folder), model))


def checks(folder: Path, model: nn.Module | str | None = None) -> Iterator[Check]:
    """Yield checks as they are done."""
    wrong = check_manifest(folder)
    yield Check("hashes", not wrong, "; ".join(wrong[:3]) or "every file is as written")
    if wrong:
        return
    structure = read_json(folder / "structure.json")
    if structure["layout"] == "onnx":
        from .onnx_checks import checks as of_file

        yield from of_file(folder, structure, model)
        return
    module: list[nn.Module] = []

    def reload() -> Check:
        module.append(load_folder(folder, model))
        return reloaded(folder, structure, module[0])

    yield tried("reload", reload)
    if module:
        if structure["layout"] == "per-layer":
            yield tried("modelling file", lambda: modelling(folder, module[0]))
        yield tried("plan identity", lambda: plan_identity(folder, structure, module[0], model))
        yield from exported(folder, structure, module[0])
