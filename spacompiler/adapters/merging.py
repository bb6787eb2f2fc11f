"""Merge adapters into their base, in float32 or better, and check it: adapter = merged.

peft builds, combines and merges the layers. This module refuses what peft would merge wrongly,
ignore or invent, and compares the merged network with the adapted one on a probe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SpaError
from ..evidence.calls import Inputs, as_call
from ..evidence.watching import watched
from ..system.process import no_warnings
from ..torch_backend import weights
from ..torch_backend.emit.biases import add_bias
from . import combining, tying
from .files import ORIGIN, PREFIX, Adapter, check_keys, check_type
from .folding import fold, said
from .kinds import KINDS, LAYER_TRAPS

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def library() -> Any:
    """Import peft; raises SpaError naming the extra where it is missing."""
    try:
        import peft
    except ImportError as problem:
        raise SpaError("adapters need peft, which is not installed", why=str(problem),
                       fix="pip install 'spacompiler[adapters]'") from problem
    return peft


def is_adapted(module: object) -> bool:
    """True for a PeftModel (without importing peft)."""
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def merge(module: nn.Module, adapters: Sequence[Adapter], inputs: Inputs, *,
          combine: str = "cat", base: dict[str, torch.Tensor] | None = None
          ) -> tuple[nn.Module, list[str]]:
    """Return the module with adapters merged into its weights, and notes for the report.

    The module is changed. Several adapters, or one with a weight, are made one first: `cat` is
    the exact weighted sum. `base` takes copies of the arrays that merging changes.

    Raises:
        SpaError: an adapter of another base, or one that can't be merged or combined.
        ProofError: the merged network is not the adapted one.
    """
    for adapter in adapters:
        _check_origin(module, adapter)
    where = ", ".join(str(a.path) for a in adapters)
    adapters = combining.combined(adapters, combine, [p for p, _ in module.named_modules()],
                                  partial(_seen, module, inputs))
    adapters = [tying.own_factors(module, adapter) for adapter in adapters]
    notes, shared = prepare(module, adapters)
    trainable = {name: p.requires_grad for name, p in module.named_parameters()}
    before = results(module, inputs)
    tuned = attach(module, adapters)
    if base is not None:
        base.update(_before_merging(tuned))
    merged, found = fold(tuned, partial(results, inputs=inputs), before, where=where)
    found += tying.tied_again(merged, shared)
    for name, p in merged.named_parameters():
        p.requires_grad_(trainable.get(name, True))
    for name, tensor in merged.state_dict().items():
        if base is not None and name in base and torch.equal(base[name], tensor):
            del base[name]
    return merged, [*notes, *found]


def _before_merging(tuned: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the base's arrays in adapted modules, by their names in the base."""
    adapted = tuple(f"{path.removeprefix(PREFIX)}." for path, part in tuned.named_modules()
                    if hasattr(part, "base_layer") or hasattr(part, "original_module"))
    return {name: tensor.detach().clone()
            for name, tensor in library().get_base_model_state_dict(tuned).items()
            if name.startswith(adapted)}


def merge_adapted(tuned: PeftModel, inputs: Inputs) -> tuple[nn.Module, list[str]]:
    """Return a merged copy of a PeftModel of the user's, which stays as it is, and notes."""
    tuned = tying.copied(tuned)
    active = tuned.active_adapters if hasattr(tuned, "active_adapters") else ()
    for name in active:
        config = _plain(tuned.peft_config[name])
        check_type(type(tuned).__name__, config)
        for key in list(tuned.state_dict()):
            plain = key.replace(f".{name}", "")
            for ending in KINDS[config["peft_type"]].biases:
                if plain.endswith(ending):
                    add_bias(tuned, f"{plain.removesuffix(ending)}.base_layer")
    notes = master(tuned)
    idle = sorted(set(tuned.peft_config) - set(active))
    if idle:
        notes.append(f"the PeftModel's adapters {', '.join(idle)} are not active: left out")
    with no_warnings(), tuned.disable_adapter():
        before = results(tuned, inputs)
    _check_layers(tuned)
    layers = {path for path, part in tuned.named_modules() if hasattr(part, "base_layer")}
    shared = tying.untied(tuned, {f"{path}.base_layer" for path in layers})
    merged, found = fold(tuned, partial(results, inputs=inputs), before, where="the PeftModel")
    found += tying.tied_again(merged, [pair.stripped() for pair in shared])
    for p in merged.parameters():
        p.requires_grad_(p.is_floating_point())
    return merged, [*notes, *found]


def _plain(config: PeftConfig) -> dict[str, Any]:
    found = config.to_dict()
    return {**found, "peft_type": str(getattr(config.peft_type, "value", config.peft_type))}


# --- the base ---------------------------------------------------------------------------------


def prepare(module: nn.Module, adapters: Sequence[Adapter]
            ) -> tuple[list[str], list[tying.Pair]]:
    """Give the base what its adapters need: float32 weights, biases, untied arrays.

    Returns notes, and the layers that shared an array.
    """
    notes = master(module)
    touched = {path for a in adapters for path in targets(module, a)}
    wanted = sorted({key.removeprefix(PREFIX).removesuffix(ending) for a in adapters
                     for key in a.tensors for ending in a.kind.biases if key.endswith(ending)})
    added = [path for path in wanted if add_bias(module, path)]
    if added:
        notes.append(f"zero biases were added to {len(added)} layers for the adapter "
                     f"({added[0]}, ...)")
    return notes, tying.untied(module, touched)


def master(module: nn.Module) -> list[str]:
    """Make the weights at least float32, in place; returns a note where that changed them."""
    low = {str(p.dtype) for p in module.parameters()
           if p.is_floating_point() and p.dtype.itemsize < 4}
    if low:
        module.float()
    return [f"adapters are merged in float32, and the result is float32 (from {', '.join(low)})"
            ] if low else []


def targets(module: nn.Module, adapter: Adapter) -> set[str]:
    """Return the paths of the innermost modules that an adapter's arrays are named after."""
    paths, found = {path for path, _ in module.named_modules()}, set()
    for key in adapter.tensors:
        path = key.removeprefix(PREFIX)
        while path not in paths:
            path = path.rpartition(".")[0]
        found.add(path)
    return found


# --- attaching --------------------------------------------------------------------------------


def attach(module: nn.Module, adapters: Sequence[Adapter]) -> Any:
    """Put adapters on a module with peft, and return the PeftModel, the first one active.

    Raises SpaError if an adapter was made for another base: a module or an array is missing, left
    over, or of another shape.
    """
    peft = library()
    tuned: PeftModel = None
    for i, adapter in enumerate(adapters):
        config = _config(peft, adapter)
        try:
            with no_warnings():
                if tuned is None:
                    tuned = peft.PeftModel(module, config, adapter_name=_name(i))
                else:
                    tuned.add_adapter(_name(i), config)
                _fill(peft, tuned, adapter, _name(i))
        except SpaError:
            raise
        except Exception as problem:  # peft and torch raise many kinds here
            raise SpaError("the adapter does not fit this model", where=str(adapter.path),
                           why=said(problem), fix=_base(adapter)) from problem
    _check_layers(tuned)
    return tuned.eval()


def _name(index: int) -> str:
    return f"adapter{index}"


def _config(peft: ModuleType, adapter: Adapter) -> Any:
    """The stored configuration; without a task, so that any torch module will do as base."""
    found, known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.type)], \
        defaults(adapter.type).keys()
    check_keys(str(adapter.path), adapter.config, known)
    try:
        with no_warnings():
            config = found(**{k: v for k, v in adapter.config.items() if k in known})
    except Exception as problem:
        raise SpaError("adapter_config.json cannot be used", where=str(adapter.path),
                       why=said(problem)) from problem
    config.task_type, config.inference_mode = None, True
    if hasattr(config, "progressbar"):
        config.progressbar = False
    return config


def defaults(kind: str) -> dict[str, Any]:
    """The keys that a configuration of a type may have in peft, with their defaults."""
    peft = library()
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            for f in dataclasses.fields(config)}


def _fill(peft: ModuleType, tuned: PeftModel, adapter: Adapter, name: str) -> None:
    """Load the arrays; none may be left over, and none of the type's own may be missing."""
    loaded = peft.set_peft_model_state_dict(tuned, dict(adapter.tensors), adapter_name=name)
    prefix = getattr(tuned.base_model, "prefix", "")
    absent, names = set(loaded.missing_keys), dict[int, set[str]]()
    for key, p in tuned.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(key)  # layers may share one array
    missing = sorted(min(keys) for keys in names.values()
                     if keys <= absent and any(prefix in key and name in key.split(".")
                                               for key in keys))
    left = [*loaded.unexpected_keys, *missing]
    if left:
        raise SpaError("the adapter does not fit this model", where=str(adapter.path),
                       why=f"{len(loaded.unexpected_keys)} of its arrays belong to no module and "
                           f"{len(missing)} are missing, e.g. {left[0].replace(f'.{name}', '')}",
                       fix=_base(adapter))


def _check_origin(module: nn.Module, adapter: Adapter) -> None:
    """An adapter that this compiler wrote says which weights it belongs to."""
    from ..torch_backend.weights import weights_hash

    wanted = adapter.origin.get("weights_hash")
    if wanted and wanted != weights_hash(module):
        raise SpaError("the adapter belongs to another base", where=str(adapter.path),
                       why=f"the hash of the base's weights is not the one in {ORIGIN}",
                       fix="give the model that it was cut or lifted for")


def _base(adapter: Adapter) -> str:
    base = adapter.config.get("base_model_name_or_path")
    return f"give the base that it was trained on{f': {base}' if base else ''}"


def _check_layers(tuned: PeftModel) -> None:
    used = {str(getattr(c.peft_type, "value", c.peft_type)) for c in tuned.peft_config.values()}
    for kind, wrong, why in LAYER_TRAPS:
        for path, layer in tuned.named_modules():
            if kind in used and hasattr(layer, "get_base_layer") and \
                    wrong(layer.get_base_layer()):
                raise SpaError(f"this {kind} adapter cannot be merged", where=path, why=why,
                               fix="prune the base without it")


# --- running ----------------------------------------------------------------------------------


def results(module: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return copies of a module's flat results, in eval mode."""
    return [x.clone() for x in weights.results(module, *as_call(inputs))]


def _seen(module: nn.Module, inputs: Inputs, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """The inputs of layers on a call, (n, i), by path."""
    found: dict[str, torch.Tensor] = {}

    def keep(path: str, part: nn.Module, args: tuple[Any, ...], *rest: object) -> None:
        found[path] = args[0].detach().reshape(-1, args[0].shape[-1]).float()

    with watched({path: module.get_submodule(path) for path in paths}, keep):
        results(module, inputs)
    missing = next((path for path in paths if path not in found), None)
    if missing is not None:
        raise SpaError("the example inputs do not reach a layer of the adapter", where=missing,
                       why="q='auto' is measured there", fix="give q as a number")
    return found


def facts(adapters: Sequence[Adapter]) -> list[Mapping[str, Any]]:
    """Return what a recipe says of its adapters."""
    return [{"path": str(a.path), "type": a.type, "weight": a.weight} for a in adapters]
