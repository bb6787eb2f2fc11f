"""Read an adapter: its configuration and arrays; of a pickle, nothing but arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SpaError, UsageError
from ..request.registry import parse as parse_call
from ..store import strict_json
from .kinds import KINDS, TRAPS, Kind

if TYPE_CHECKING:
    import torch

CONFIGS = ("adapter_config.json", "config.json")
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ORIGIN = "spacompiler.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter as stored: `config` is its configuration, `tensors` the arrays by name.

    A `foreign` one is of another origin than peft, and `options` are those given for it.
    """

    path: Path
    weight: float
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    origin: Mapping[str, Any]
    foreign: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """peft's name of its type; arrays of another origin become LORA."""
        return "LORA" if self.foreign else str(self.config["peft_type"])

    @property
    def kind(self) -> Kind:
        """What is known of its type."""
        return KINDS[self.type]


OPTIONS = ("rank", "alpha")


def parse(text: str) -> tuple[Path, float, dict[str, Any]]:
    """Return (path, weight, options) of `PATH`, `PATH=0.5` or `PATH(rank=4)=0.5`.

    Raises UsageError for a weight that is no number, and for options that do not exist.

    >>> parse("tuned(rank=4)=0.5")
    (PosixPath('tuned'), 0.5, {'rank': 4})
    """
    if not text.strip():
        raise UsageError("the name of the adapter is empty", fix="write DIR or DIR=0.5")
    if Path(text).exists():
        return Path(text), 1.0, {}
    place, sign, number = text.rpartition("=")
    if not sign or number.endswith(")"):
        place, number = text, "1"
    options: dict[str, Any] = {}
    if place.endswith(")") and not Path(place).exists():
        place, options = parse_call(place)
    try:
        weight = float(number)
    except ValueError:
        raise UsageError(f"cannot read the weight of adapter {text!r}",
                         fix="write DIR or DIR=0.5") from None
    wrong = [k for k, v in options.items() if k not in OPTIONS or not isinstance(v, (int, float))]
    if wrong:
        raise UsageError(f"adapters have no option {wrong[0]!r}", where=text,
                         fix="options: rank (the first ranks of a DyLoRA), alpha; numbers")
    return Path(place), weight, options


def other_names(adapters: Sequence[Adapter], name: str) -> list[str]:
    """Notes on adapters whose configuration names another base (paths differ, so no error)."""
    notes = []
    for adapter in adapters:
        base = str(adapter.config.get("base_model_name_or_path") or "")
        if base and Path(base).name.lower() not in name.lower():
            notes.append(f"{adapter.path}: its configuration names {base} as base; "
                         f"its arrays fit {name}")
    return notes


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises SpaError if it is missing or damaged."""
    found: dict[str, Any] = strict_json.read(
        file, {str: object}, fix="give a directory saved by peft's save_pretrained")
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


def stored(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, arrays) of a file or directory; an empty configuration where there is none.

    A file's own metadata may hold one, as diffusers writes it.
    """
    if not path.exists():
        raise SpaError(f"there is no adapter at {str(path)!r}", why="no such file or directory",
                       fix="give a directory saved by peft's save_pretrained, or a file of "
                           "another origin")
    if path.is_file():
        return _metadata(path), _tensors(path)
    configs = [read_json(path / name) for name in CONFIGS if (path / name).is_file()]
    config = next((c for c in configs if "peft_type" in c or "delta_type" in c), {})
    named = [path / name for name in (WEIGHTS, PICKLE) if (path / name).is_file()]
    files = named[:1] or [f for f in sorted(path.iterdir()) if f.suffix in LOADERS]
    if len(files) != 1:
        raise SpaError(f"{WEIGHTS} is missing", where=str(path),
                       why=f"{len(files)} other files of weights lie there",
                       fix="copy the whole directory that was saved, or give the file itself")
    return config or _metadata(files[0]), _tensors(files[0])


def _metadata(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its adapter (empty for others)."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, "pt") as opened:
            said = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except Exception:  # what cannot be read is said when its arrays are
        return {}
    return said if isinstance(said, dict) else {}


def _safe(file: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(file)


def _pickled(file: Path) -> Any:
    """Arrays of a pickle, of which nothing but arrays is made."""
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)


LOADERS: Mapping[str, Callable[[Path], Any]] = {
    ".safetensors": _safe, ".bin": _pickled, ".pt": _pickled, ".pth": _pickled}


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    import torch

    if file.suffix not in LOADERS:
        raise SpaError(f"{file.name} is no file of weights that is read", where=str(file.parent),
                       fix=f"give one that ends in {', '.join(LOADERS)}")
    unsigned = torch.uint16, torch.uint32, torch.uint64  # torch computes nothing with them
    try:
        tensors = LOADERS[file.suffix](file)
        if not isinstance(tensors, dict) or not all(
                isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
            raise ValueError("it is no dictionary of arrays")
    except Exception as problem:  # safetensors and torch raise their own kinds
        raise SpaError(f"{file.name} cannot be read", where=str(file.parent),
                       why=str(problem).splitlines()[0] if str(problem) else "",
                       fix="copy it again, or save it as safetensors") from problem
    for name, tensor in tensors.items():
        if tensor.dtype in unsigned:
            raise SpaError(f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}",
                           where=str(file), why="numbers of that type are no weights",
                           fix="copy it again, or save it as safetensors in float32")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SpaError(f"{name} holds NaN or infinity", where=str(file),
                           fix="use an adapter with finite weights")
    return tensors
