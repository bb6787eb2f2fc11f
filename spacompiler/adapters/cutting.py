"""Cut an adapter as its base was cut, so that both still belong together; and lift one back.

A slice of the merged weight is the merge of the slices where each stored array follows the rows or
columns of its weight (`Kind.axes`): LoRA keeps B[R, :] and A[:, C]. What follows from the weights
is taken from the pruned merged weights instead: DoRA's magnitudes are its row norms, which change
where columns go. Types with a low-rank difference W' - W are written as LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import SpaError
from ..stages.tolerances import LOW_RANK, WEIGHT_ROUNDING
from .files import CONFIG, ORIGIN, PREFIX, WEIGHTS, Adapter

FROM_WEIGHTS = ("lora_magnitude_vector", "ln_tuning_layers.weight", "ln_tuning_layers.bias")


@dataclass(frozen=True)
class Cut:
    """How a plan cut one array: its dense shape, and the kept indices of each dimension."""

    shape: tuple[int, ...]
    kept: tuple[torch.Tensor | None, ...]

    @property
    def pruned(self) -> tuple[int, ...]:
        """The shape that the array has after it."""
        return tuple(n if k is None else len(k) for n, k in zip(self.shape, self.kept,
                                                                  strict=True))


@dataclass(frozen=True)
class Part:
    """One stored array of an adapter: the weight that it belongs to, and what its axes follow."""

    key: str
    path: str
    name: str
    axes: tuple[str, ...]
    transposed: bool

    @property
    def weight(self) -> str:
        """The name of the weight that it belongs to."""
        return f"{self.path}.weight"

    def followed(self, tensor: torch.Tensor, cut: Cut, shape: tuple[int, ...]
                 ) -> Iterator[tuple[int, int]]:
        """Yield (dimension of the array, dimension of the weight); size 1 broadcasts.

        Raises SpaError if the array is not laid out as its type's axes say.
        """
        if tensor.ndim < len(self.axes):
            raise _mixed(self, "its arrays have an unusual layout")
        for d, axis in enumerate(self.axes):
            if axis == "-" or tensor.shape[d] == 1:
                continue
            at = ("out", "in").index(axis) ^ self.transposed
            if at >= len(cut.shape) or tensor.shape[d] != shape[at]:
                raise _mixed(self, f"dimension {d} of {self.name} is not the {axis} features")
            yield d, at


def _mixed(part: Part, why: str) -> SpaError:
    return SpaError("this adapter cannot be sliced", where=part.key, why=why,
                    fix="merge it: leave out --keep-adapter")


def parts(adapter: Adapter) -> Iterator[Part]:
    """Yield the arrays that the adapter's type knows; others follow no axis."""
    for key in adapter.tensors:
        for name, axes in adapter.kind.axes.items():
            if key.endswith(f".{name}"):
                path = key.removeprefix(PREFIX).removesuffix(f".{name}")
                turned = bool(adapter.config.get("fan_in_fan_out")) or "embedding" in name
                yield Part(key, path, name, tuple(axes.split()), turned)


# --- slicing ----------------------------------------------------------------------------------


@dataclass
class Sliced:
    """An adapter for the pruned base, as peft stores it."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    origin: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write peft's files, and where the adapter comes from."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=1, sort_keys=True, default=str) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        save_file({k: v.detach().clone().contiguous() for k, v in sorted(self.tensors.items())},
                  folder / WEIGHTS, metadata={"format": "pt"})
        (folder / ORIGIN).write_text(json.dumps(self.origin, sort_keys=True) + "\n",
                                     encoding="utf-8")


def check_sliceable(adapter: Adapter) -> None:
    """Raise SpaError for an adapter that must be merged first."""
    _check_whole_parameters(adapter, "sliced", "merge it: leave out --keep-adapter")
    if not adapter.kind.axes and not adapter.kind.as_lora:
        raise SpaError(f"adapters of type {adapter.type} cannot be sliced",
                       where=str(adapter.path),
                       why="each of their parameters acts on all rows or columns of a weight",
                       fix="merge it: leave out --keep-adapter")


def _check_whole_parameters(adapter: Adapter, done: str, fix: str) -> None:
    names = adapter.config.get("target_parameters") or ()
    if names:
        named = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
        raise SpaError(f"adapters of whole parameters cannot be {done}", where=str(adapter.path),
                       why=f"peft lays out the factors of all experts of {named} in "
                           "one array, of which no axis is an expert's", fix=fix)


def sliced(adapter: Adapter, cuts: Mapping[str, Cut], merged: Mapping[str, torch.Tensor],
           base: Mapping[str, torch.Tensor]) -> Sliced:
    """Return the adapter for the pruned base.

    `merged` and `base` are the pruned arrays with and without the adapter, by name.

    Raises SpaError if an array does not follow its weight as the type's axes say.
    """
    if adapter.kind.as_lora:
        return _as_lora(adapter, merged, base)
    made = {}
    for part in parts(adapter):
        made[part.key] = _from_weights(part, adapter, merged) if part.name in FROM_WEIGHTS else \
            _selected(adapter.tensors[part.key], part, cuts)
    for key in adapter.tensors.keys() - made.keys():
        made[key] = _whole(key, {**merged, **base} if ".base_layer." in key else merged)
    config = {**adapter.config, "base_model_name_or_path": None}
    if "init_lora_weights" in config:  # the base at hand already is what the init made of it
        config["init_lora_weights"] = True
    return Sliced(config, made, {})


def _selected(tensor: torch.Tensor, part: Part, cuts: Mapping[str, Cut]) -> torch.Tensor:
    cut = cuts[part.weight]
    for d, at in part.followed(tensor, cut, cut.shape):
        kept = cut.kept[at]
        if kept is not None:
            tensor = tensor.index_select(d, kept)
    return tensor


def _from_weights(part: Part, adapter: Adapter, merged: Mapping[str, torch.Tensor]
                  ) -> torch.Tensor:
    """DoRA: m = ‖W'‖ by rows of the pruned merged weight; tuned norms: the merged norm itself."""
    if part.name != "lora_magnitude_vector":
        return merged[f"{part.path}.{part.name.rpartition('.')[2]}"]
    weight = merged[part.weight]
    if adapter.tensors[part.key].ndim != 1 or weight.ndim != 2:
        raise _mixed(part, "magnitudes of convolutions are laid out in another way")
    return weight.norm(dim=0 if part.transposed else 1)


def _whole(key: str, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A whole array that the adapter brings (modules_to_save, trained biases, embeddings)."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name not in arrays:
        raise SpaError("this adapter cannot be sliced", where=key,
                       why="it is not known which axis that array follows",
                       fix="merge it: leave out --keep-adapter")
    return arrays[name]


def _as_lora(adapter: Adapter, merged: Mapping[str, torch.Tensor],
             base: Mapping[str, torch.Tensor]) -> Sliced:
    """Write W' - W = B A, of the type's rank, as LoRA with alpha = rank."""
    rank = int(adapter.config.get("r") or 0)
    tensors: dict[str, torch.Tensor] = {}
    paths = []
    for name in sorted(base):
        path = name.removesuffix(".weight")
        change = merged[name].double() - base[name].double()
        noise = WEIGHT_ROUNDING.value * merged[name].double().norm()
        factors = low_rank(change, rank, noise) if path != name and change.ndim == 2 else None
        if factors is None:
            raise SpaError("this adapter cannot be written as LoRA", where=name,
                           why=f"what it adds is not of rank {rank}",
                           fix="merge it: leave out --keep-adapter")
        paths.append(path)
        for letter, factor in zip("BA", factors, strict=True):
            tensors[f"{PREFIX}{path}.lora_{letter}.weight"] = factor.to(merged[name].dtype)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": paths,
              "bias": "none", "inference_mode": True, "init_lora_weights": True,
              "task_type": adapter.config.get("task_type"), "base_model_name_or_path": None}
    return Sliced(config, tensors, {})


def low_rank(change: torch.Tensor, rank: int, noise: torch.Tensor | float = 0.0
             ) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return B (o, rank) and A (rank, i) with B A = change (o, i) up to noise, or None.

    A random range finder (Halko et al. 2011) of a few more columns, then a small SVD.
    """
    generator = torch.Generator().manual_seed(0)
    width = min(rank + 8, *change.shape)
    probe = torch.randn(change.shape[1], width, generator=generator, dtype=change.dtype)
    q, _ = torch.linalg.qr(change @ probe)
    u, s, v = torch.linalg.svd(q.T @ change, full_matrices=False)
    b, a = q @ u[:, :rank] * s[:rank], v[:rank]
    if b.shape[1] < rank:
        b = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
    gap = (b @ a - change).norm()
    return (b, a) if gap <= LOW_RANK.value * change.norm() + noise else None


# --- lifting ----------------------------------------------------------------------------------


def lifted(adapter: Adapter, cuts: Mapping[str, Cut]) -> Sliced:
    """Return an adapter trained on the pruned model, scattered to the dense one (LoRAM).

    What the pruned model lacks gets the value that changes nothing there (0; 1 for IA3).

    Raises SpaError for a type whose arrays depend on weights that the pruned model lacks.
    """
    _check_whole_parameters(adapter, "lifted", "train LoRA on layers of the pruned model")
    known = {part.key: part for part in parts(adapter)}
    made = {}
    for key, tensor in adapter.tensors.items():
        part = known.get(key)
        cut = cuts.get(part.weight) if part is not None else cuts.get(key.removeprefix(PREFIX))
        follows = part.name in FROM_WEIGHTS if part is not None else cut is not None
        if follows:
            raise SpaError("this adapter cannot be lifted", where=key,
                           why="its values for what was removed do not follow from it",
                           fix="train LoRA on the pruned model")
        made[key] = tensor if part is None or cut is None else \
            _scattered(tensor, part, cut, adapter.kind.fill)
    if not known:
        raise SpaError(f"adapters of type {adapter.type} cannot be lifted",
                       where=str(adapter.path),
                       why="their arrays do not follow the axes of a weight",
                       fix="train LoRA on the pruned model")
    return Sliced({**adapter.config, "base_model_name_or_path": None}, made, {})


def _scattered(tensor: torch.Tensor, part: Part, cut: Cut, fill: float) -> torch.Tensor:
    for d, at in part.followed(tensor, cut, cut.pruned):
        kept = cut.kept[at]
        if kept is not None:
            shape = list(tensor.shape)
            shape[d] = cut.shape[at]
            tensor = torch.full(shape, fill, dtype=tensor.dtype).index_copy(d, kept, tensor)
    return tensor
