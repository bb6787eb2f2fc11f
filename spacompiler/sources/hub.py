"""A model of the hub, fetched to a directory: configuration, safetensors, what lies beside them.

Only files that are used are fetched, never pickles, and code only where it is trusted.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import SpaError
from ..store import beside, weight_files


def fetch(name: str, *, trust: bool = False, local: bool = False) -> Path:
    """Return the directory of a model in the hub's cache, fetching what is not there yet.

    With `local` nothing is fetched. Raises SpaError where there is no such model.
    """
    first = [weight_files.CONFIG, "*.safetensors.index.json", *beside.CARRIED]
    folder = _snapshot(name, [*first, *(["*.py"] if trust else [])], local)
    if not (folder / weight_files.CONFIG).is_file():
        weight_files.check(str(folder))
    wanted = [weight_files.WEIGHTS]
    if (folder / weight_files.INDEX).is_file() or \
            weight_files.read(folder / weight_files.CONFIG).get("transformers_weights"):
        wanted = weight_files.weight_names(folder)
    return weight_files.check(str(_snapshot(name, wanted, local, folder.name)))


def _snapshot(name: str, patterns: list[str], local: bool, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns,
                                      local_files_only=local))
    except Exception as problem:  # the hub's client raises many kinds
        reason = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise SpaError(f"there is no model {name!r} here, and none could be fetched from the hub",
                       why=reason,
                       fix="give zoo:NAME, a transformers directory, a hub id that can be "
                           "reached, an .onnx file, or package.module:factory") from problem
