"""Adapters put on a module for a while: peft makes them in place and takes them off again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from spacompiler.adapters.merging import library
from spacompiler.errors import SpaError, UsageError, did_you_mean
from spacompiler.groups.solution import Group
from spacompiler.system.staging import Scratch

NAME = "default"
ADAPTABLE = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D")


def adaptable(module: nn.Module, groups: Iterable[Group], only: str = "") -> list[str]:
    """Return the paths of the layers that groups pass through and that an adapter fits on.

    `only` is a regular expression over paths. Grouped convolutions have no adapters that merge.
    """
    paths = dict.fromkeys(m.weight.rpartition(".")[0] for g in groups for m in g.members
                          if m.weight.endswith("weight"))
    return [path for path in paths if (not only or re.search(only, path))
            and type(part := module.get_submodule(path)).__name__ in ADAPTABLE
            and getattr(part, "groups", 1) == 1]


class Attached:
    """Adapters of one type on some layers of a module; the rest of it is frozen meanwhile.

    `dtype` other than float32 holds the adapted layers' own weights in it until the adapters
    come off; the originals wait in a file. `options` are fields of peft's config; those that a
    type does not have are left out.

    Raises UsageError for a type that is unknown or that peft cannot put there.
    """

    def __init__(self, module: nn.Module, paths: list[str], *, adapter: str = "lora",
                 dtype: str = "float32", **options: object) -> None:
        if not paths:
            raise SpaError("no layer can be adapted", why="adapters fit on linear layers and "
                           "ungrouped convolutions", fix="use importance='taylor'")
        self.module = module
        self._trainable = {name: p.requires_grad for name, p in module.named_parameters()}
        self._tuner = _tuner(module, paths, adapter, options)
        self._half = _Half(module, paths, dtype) if dtype != "float32" else None

    def parameters(self) -> list[nn.Parameter]:
        """Return the adapters' parameters."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def off(self, *, merge: bool) -> None:
        """Take the adapters off, merged into the weights (in their own precision) or not."""
        if self._half is not None:
            self._half.restore()
        if merge:
            self._tuner.merge_and_unload(safe_merge=True)
        else:
            self._tuner.unload()
        for name, p in self.module.named_parameters():
            p.requires_grad_(self._trainable.get(name, True))


def _tuner(module: nn.Module, paths: list[str], adapter: str, options: Mapping[str, Any]) -> Any:
    peft = library()
    kinds = {str(kind.value).lower(): kind for kind in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING}
    if adapter.lower() not in kinds:
        raise UsageError(f"unknown adapter type {adapter!r}", fix=did_you_mean(adapter, kinds))
    kind = kinds[adapter.lower()]
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    known = {f.name for f in dataclasses.fields(config_class)}
    given = {k: v for k, v in options.items() if k in known}
    try:
        config = config_class(target_modules="|".join(map(re.escape, paths)), **given)
        return peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind](module, {NAME: config}, NAME)
    except (TypeError, ValueError, NotImplementedError) as problem:
        raise UsageError(f"peft cannot put {adapter!r} adapters on these layers",
                         why=str(problem).splitlines()[0],
                         fix="choose layers by a pattern, or another type") from problem


class _Half:
    """The weights of adapted layers in a smaller type, their originals in a file."""

    def __init__(self, module: nn.Module, paths: list[str], dtype: str) -> None:
        from safetensors.torch import save_file

        self._kind = getattr(torch, dtype)
        self._folder = Scratch()
        self._file = self._folder.path / "base.safetensors"
        self._layers: dict[str, Any] = {}
        for path in paths:
            wrapped: Any = module.get_submodule(path)
            self._layers[path] = wrapped.get_base_layer()
        save_file({f"{path}.{name}": p.detach() for path, layer in self._layers.items()
                   for name, p in layer.named_parameters()}, self._file)
        self._hooks = []
        for layer in self._layers.values():
            for p in layer.parameters():
                p.data = p.data.to(self._kind)
            self._hooks += [
                layer.register_forward_pre_hook(lambda part, args: (args[0].to(self._kind),
                                                                    *args[1:])),
                layer.register_forward_hook(lambda part, args, result: result.float())]

    def restore(self) -> None:
        from safetensors import safe_open

        for handle in self._hooks:
            handle.remove()
        with safe_open(self._file, framework="pt") as file:
            for path, layer in self._layers.items():
                for name, p in layer.named_parameters():
                    p.data = file.get_tensor(f"{path}.{name}")
        self._folder.cleanup()
