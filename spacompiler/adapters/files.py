"""Read an adapter's directory: its configuration and arrays, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpaError, UsageError
from .kinds import KINDS, TRAPS, Kind

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ORIGIN = "spacompiler.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter as stored: `config` is adapter_config.json, `tensors` the arrays by name."""

    path: Path
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    origin: Mapping[str, Any]

    @property
    def type(self) -> str:
        return str(self.config["peft_type"])

    @property
    def kind(self) -> Kind:
        return KINDS[self.type]


def parse(text: str) -> tuple[Path, float]:
    """Return (directory, weight) of `DIR` or `DIR=0.5`.

    >>> parse("tuned=0.5")
    (PosixPath('tuned'), 0.5)
    """
    folder, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(folder), float(number)
    except ValueError:
        raise UsageError(f"cannot read the weight of adapter {text!r}",
                         fix="write DIR or DIR=0.5") from None


def read(path: Path, weight: float = 1.0) -> Adapter:
    """Read and check an adapter's files.

    Raises SpaError: no adapter there, pickled or damaged weights, or a type that can't be merged.
    """
    if not path.is_dir():
        raise SpaError(f"there is no adapter at {str(path)!r}", why="no such directory",
                       fix="give a directory saved by peft's save_pretrained")
    config = _json(path / CONFIG)
    check_type(str(path), config)
    return Adapter(path, weight, config, _tensors(path),
                   _json(path / ORIGIN) if (path / ORIGIN).exists() else {})


def other_names(adapters: Sequence[Adapter], name: str) -> list[str]:
    """Notes on adapters whose configuration names another base (paths differ, so no error)."""
    notes = []
    for adapter in adapters:
        base = str(adapter.config.get("base_model_name_or_path") or "")
        if base and Path(base).name.lower() not in name.lower():
            notes.append(f"{adapter.path}: its configuration names {base} as base; "
                         f"its arrays fit {name}")
    return notes


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as problem:
        raise SpaError(f"{file.name} cannot be read", where=str(file.parent), why=str(problem),
                       fix="give a directory saved by peft's save_pretrained") from problem
    return found


def check_type(where: str, config: Mapping[str, Any]) -> None:
    """Raise SpaError for a type or configuration that cannot be merged."""
    name = str(config.get("peft_type", ""))
    kind = KINDS.get(name)
    if kind is None:
        raise SpaError(f"adapters of type {name or 'unknown'!r} are not known", where=where,
                       why="adapter_config.json names it as peft_type",
                       fix="merge it with peft, save the model, and prune that")
    if kind.refused:
        raise SpaError(f"adapters of type {name} cannot be merged", where=where,
                       why=kind.refused, fix="prune the base without it")
    for trap in TRAPS:
        if name in trap.kinds and trap.when(config):
            raise SpaError(f"this {name} adapter cannot be merged", where=where,
                           why=trap.why, fix=trap.fix)


def check_keys(where: str, config: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise SpaError for a key of a configuration that is not known and says something.

    Empty values (null, false, [], {}) are what writers of other versions leave for what they do
    not use; `runtime_config` says where an adapter was, not what it is.
    """
    said = sorted(key for key, value in config.items() if key not in known
                  and key != "runtime_config" and value not in (None, False, [], {}, ""))
    if said:
        raise SpaError(f"{CONFIG} says what is not understood: {', '.join(said)}", where=where,
                       why=f"adapters of type {config.get('peft_type')} are not known to have it, "
                           "and without it they may be others",
                       fix="merge it with the library that wrote it, save the model, and prune "
                           "that")


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    import torch
    from safetensors.torch import load_file

    if not (path / WEIGHTS).exists():
        pickled = (path / PICKLE).exists()
        raise SpaError(f"{WEIGHTS} is missing", where=str(path),
                       why="pickled weights (adapter_model.bin) are not read" if pickled else "",
                       fix="save the adapter again with safe_serialization=True" if pickled else
                           "copy the whole directory that peft saved")
    try:
        tensors = load_file(path / WEIGHTS)
    except Exception as problem:  # safetensors raises its own kinds
        raise SpaError(f"{WEIGHTS} cannot be read", where=str(path), why=str(problem),
                       fix="copy it again: the file is damaged") from problem
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SpaError(f"{name} holds NaN or infinity", where=str(path / WEIGHTS),
                           fix="use an adapter with finite weights")
    return tensors
