"""A model card, README.md with front matter, as model hubs read it; and how it gets there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import SpaError
from ..store.folder import check_hashes
from . import report


def card(data: Mapping[str, Any], base: str) -> str:
    """Return the card of a compile; `base` is what it was made from, "" if that has no name."""
    stock = data["layout"] in ("uniform", "per-layer")
    front: dict[str, Any] = {"base_model": base} if base else {}
    front |= {"library_name": "transformers" if stock else "onnx" if data["layout"] == "onnx"
              else "spacompiler", "tags": ["pruned", "structured-pruning", "spacompiler"]}
    rows = ["| | dense | pruned | stays |", "|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in report.table_rows(data))]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return "\n".join([
        "---", head + "---", "", f"# {data['model']}, pruned to {data['target']}", "",
        report.sentence(data), "", *rows, "", "## How to load it", "", "```python",
        report.loading(data), "```", "",
        "`report.html` shows widths, scores and what stayed; `recipe.yaml` makes it again.", ""])


def push(folder: Path, repository: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload an artifact to a model repository of the hub and return its address.

    Raises SpaError for a damaged artifact, or what the hub refuses. Nothing else here uploads.
    """
    check_hashes(folder)
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=str(folder)))
    except Exception as problem:  # the hub raises many kinds
        raise SpaError(f"{repository} cannot be uploaded to",
                       why=(str(problem).strip().splitlines() or [""])[0],
                       fix="log in (hf auth login), or give a token with the right to write"
                       ) from problem
