"""Adapters of other origins than peft: one table of what their arrays are called and mean.

Each becomes LoRA as peft stores it, so that merging, combining, slicing and the probe are the
same for all. What a layer's arrays are together (`Origin.arrays`) says where they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import SpaError
from .combining import Pair, lora_config
from .files import ORIGIN, PREFIX, Adapter, check_keys, check_type, read_json, stored
from .formulas import Layer
from .kinds import KINDS
from .naming import component, matched, spellings
from .origins import BARE, ORIGINS, REFUSED, SAYS, SAYS_NOTHING, Origin

ENDINGS = sorted({name for o in ORIGINS for group in (o.arrays, o.may, o.lists)
                  for names in group.values() for name in names}, key=len, reverse=True)
OF_PEFT = {"lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "lora_magnitude_vector"}
OLD_BONE = {"bone_block": "miss_block"}
Groups = dict[str, dict[str, list[torch.Tensor]]]


def is_foreign(kind: str, keys: Iterable[str], options: Mapping[str, object]) -> bool:
    """True for arrays that are not what peft stores for its type, or that options apply to."""
    return bool(options) or kind not in KINDS or (kind == "LORA" and any(
        ending not in OF_PEFT for key in keys if (ending := _split(key)[1])))


def check_refused(kind: str, keys: Iterable[str], where: str) -> None:
    """Raise SpaError with the reason for an origin that no weight can express."""
    if kind in KINDS and kind != "LORA":
        return
    for name, pattern, why in REFUSED:
        if kind.upper().replace("-", "_") == name or any(re.search(pattern, k) for k in keys):
            raise SpaError("this adapter cannot be merged", where=where, why=why,
                           fix="prune the base without it")


def renewed(config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
            ) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Directories of a type that peft has renamed, as it names them today (Bone: MiSS)."""
    if config.get("peft_type") != "BONE":
        return dict(config), dict(tensors)
    made = {re.sub("|".join(OLD_BONE), lambda m: OLD_BONE[m[0]], k): v for k, v in tensors.items()}
    return {**config, "peft_type": "MISS"}, made


def resolved(adapter: Adapter, module: nn.Module) -> tuple[Adapter, list[str]]:
    """Return the adapter as peft's LoRA for the layers of a module, and notes.

    Raises SpaError: arrays of no known origin, layers or sizes of another network, or a
    configuration that says what the formula does not follow.
    """
    if not adapter.foreign:
        return adapter, []
    where = str(adapter.path)
    groups, whole = _groups(adapter.tensors, module, where)
    paths, others = matched(groups, (p for p, m in module.named_modules() if _holds(m)), where)
    made, names, biases = dict[str, Pair](), set(), dict[str, torch.Tensor]()
    for name, path in paths.items():
        origin = _origin(name, groups[name], where)
        names.add(origin.name)
        layer = _layer(adapter, origin, name, path, groups[name], module)
        _check_says(adapter.type, layer.config, origin, where)
        made[path] = _formula(origin, layer)
        if "bias" in layer:
            biases[path] = layer.arrays["bias"]
    notes = [f"{where}: read as {', '.join(sorted(names))}"]
    notes += [f"{where}: its arrays for {other} belong to another network and were left out"
              for other in others]
    if whole:
        notes.append(f"{where}: {len(whole)} layers of the base are replaced whole")
    lora = _with_biases(_as_lora(adapter, made, whole, module), made, biases)
    return lora, notes


def _holds(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim > 1


def _split(key: str) -> tuple[str, str]:
    """(layer, ending) of an array's name; the ending is "" if none is known."""
    plain = re.sub(r"\.\d+$", ".*", key)
    for ending in ENDINGS:
        name = plain if ending.endswith("*") else key
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
    return key, ""


def _groups(tensors: Mapping[str, torch.Tensor], module: nn.Module, where: str
            ) -> tuple[Groups, dict[str, dict[str, torch.Tensor]]]:
    """The arrays by layer and ending, and whole arrays that the base has too, by layer."""
    found: Groups = {}
    whole: dict[str, dict[str, torch.Tensor]] = {}
    base = module.state_dict()
    for key in sorted(tensors, key=_natural):
        layer, ending = _split(key.replace(".default.", ".").removesuffix(".default"))
        name = next((n for n in spellings(key) if n in base), "")
        if ending:
            found.setdefault(layer, {}).setdefault(ending, []).append(tensors[key])
        elif name and base[name].shape == tensors[key].shape:
            path, _, leaf = name.rpartition(".")
            whole.setdefault(path, {})[leaf] = tensors[key]
        else:
            raise SpaError("the adapter holds an array that is not understood", where=where,
                           why=f"{key} belongs to no origin that is known"
                               + (f", and the base's {name} has another shape" if name else ""),
                           fix="merge it with the library that wrote it, save the model, and "
                               "prune that")
    return found, whole


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _origin(name: str, have: Iterable[str], where: str) -> Origin:
    found = next((o for o in ORIGINS if o.fits(have)), None)
    if found is None:
        raise SpaError("the adapter is not whole, or of no origin that is known", where=where,
                       why=f"{name} has {', '.join(sorted(have))}",
                       fix="copy the whole file or directory that was saved")
    return found


def _check_says(kind: str, config: Mapping[str, object], origin: Origin, where: str) -> None:
    from .merging import defaults

    named = re.sub("[-_]", "", str(config.get("peft_type", "LORA"))).upper()
    if named not in ("LORA", *origin.types):
        raise SpaError(f"adapters of type {config['peft_type']!r} are not known", where=where,
                       why=f"adapter_config.json names it as peft_type, over arrays of "
                           f"{origin.name}",
                       fix="merge it with the library that wrote it, save the model, and prune "
                           "that")
    usual = defaults(kind)
    check_keys(where, {k: v for k, v in config.items() if v != usual.get(k, ...)},
               {*SAYS, *SAYS_NOTHING, *origin.says})


def _said(config: Mapping[str, object], part: str) -> dict[str, object]:
    """What a configuration says of a component, and of all."""
    mine = {k.removeprefix(f"{part}."): v for k, v in config.items()
            if part and k.startswith(f"{part}.")}
    found = {**{k: v for k, v in config.items() if "." not in k}, **mine}
    if "lora_r" in found:
        found.setdefault("r", found["lora_r"])
    return found


def _layer(adapter: Adapter, origin: Origin, name: str, path: str,
           group: Mapping[str, list[torch.Tensor]], module: nn.Module) -> Layer:
    weight = module.get_submodule(path).get_parameter("weight").detach()
    if type(module.get_submodule(path)).__name__ == "Conv1D":
        weight = weight.T
    arrays = {what: group[n][0] for part in (origin.arrays, origin.may)
              for what, names in part.items() for n in names if n in group}
    lists = {what: group[n] for what, names in origin.lists.items() for n in names if n in group}
    said = component(name)
    unit = bool(said) or any(n in group for n in BARE)
    return Layer(path, arrays, lists, weight, _said(adapter.config, said), adapter.options, unit)


def _formula(origin: Origin, layer: Layer) -> Pair:
    try:
        a, b = origin.formula(layer)
        fits = (b.shape[0], a.shape[1]) == layer.matrix.shape
        why = f"it adds {b.shape[0]} × {a.shape[1]} to {tuple(layer.weight.shape)}"
    except (RuntimeError, IndexError, ValueError) as problem:  # of torch, where shapes differ
        fits, why = False, str(problem).splitlines()[0]
    if not fits:
        raise SpaError("the adapter does not fit this model", where=layer.path,
                       why=f"{why} ({origin.name})", fix="give the base that it was trained on")
    return a.float().contiguous(), b.float().contiguous()


def _as_lora(adapter: Adapter, made: Mapping[str, Pair],
             whole: Mapping[str, Mapping[str, torch.Tensor]], module: nn.Module) -> Adapter:
    """LoRA of peft, each layer with its own rank, alpha = rank; whole layers beside it."""
    tensors, ranks = {}, {path: len(a) for path, (a, _) in made.items()}
    for path, (a, b) in made.items():
        weight = module.get_submodule(path).get_parameter("weight")
        inner, outer = weight.shape[1:], (1,) * (weight.ndim - 2)
        wide = weight.ndim > 2
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.reshape(len(a), *inner) if wide else a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.reshape(*b.shape, *outer)
    for path, arrays in whole.items():
        part = module.get_submodule(path)
        if path in made or any(True for _ in part.children()):
            raise SpaError("the adapter holds an array that is not understood", where=path,
                           why="it brings the layer's own weights beside what it adds to them",
                           fix="merge it with the library that wrote it, save the model, and "
                               "prune that")
        for leaf, own in part.state_dict().items():
            tensors[f"{PREFIX}{path}.{leaf}"] = arrays.get(leaf, own).to(own.dtype)
    top = max(ranks.values())
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != top}
    config = {**lora_config(adapter.config, top, list(made)), "rank_pattern": patterns,
              "alpha_pattern": dict(patterns), "modules_to_save": sorted(whole) or None}
    return replace(adapter, config=config, tensors=tensors, foreign=False, options={})


def _with_biases(lora: Adapter, made: Mapping[str, Pair], biases: Mapping[str, torch.Tensor]
                 ) -> Adapter:
    """The same, adding to the layers' biases too (zeros where a layer's is not changed)."""
    if not biases:
        return lora
    more = {f"{PREFIX}{path}.lora_B.bias": biases.get(path, torch.zeros(len(b))).float()
            for path, (_, b) in made.items()}
    return replace(lora, config={**lora.config, "lora_bias": True},
                   tensors={**lora.tensors, **more})


def read(path: Path, weight: float = 1.0, options: Mapping[str, float] | None = None) -> Adapter:
    """Read and check an adapter: a directory of peft's, or a file or directory of another origin.

    Raises SpaError: no adapter there, damaged weights, or a type that can't be merged.
    """
    given = dict(options or {})
    config, tensors = stored(path)
    kind = str(config.get("peft_type", ""))
    check_refused(kind, tensors, str(path))
    config, tensors = renewed(config, tensors)
    kind = str(config.get("peft_type", ""))
    strange = is_foreign(kind, tensors, given)
    if not strange or kind in KINDS:
        check_type(str(path), config)
    origin = read_json(path / ORIGIN) if (path / ORIGIN).exists() else {}
    return Adapter(path, weight, config, tensors, origin, strange, given)
