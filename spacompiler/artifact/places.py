"""Where the files of an artifact lie that a runtime is to find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..deploy.export import Form
from ..request.profiles import profile
from ..stages.compiled import Compiled
from ..store.folder import write_json


def onnx_place(job: Compiled, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return where model.onnx is to lie, and the options of its export.

    Beside the weights it reads those; in a folder of its own it keeps a copy.
    """
    row = profile(job.recipe.runtime)
    path = folder / row.file
    path.parent.mkdir(exist_ok=True)
    shared = sorted(folder.glob("model*.safetensors")) \
        if path.parent == folder and row.data == "{}.data" else []
    return path, {"beside": shared, "form": Form(job.recipe.opset, row.data)}


def tell_in_config(job: Compiled, folder: Path) -> None:
    """Say in config.json, where a runtime reads it there, what weights lie beside the ONNX file."""
    row = profile(job.recipe.runtime)
    path, config = folder / row.file, folder / "config.json"
    if not row.section or not path.exists() or not config.exists():
        return
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries[row.section] = {"dtype": "fp32"}
    if path.with_name(row.data.format(path.name)).exists():
        entries[row.section]["use_external_data_format"] = True
    write_json(config, entries)
