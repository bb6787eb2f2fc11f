"""What of a network lies outside of the parts of it that are compiled: a target counts it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .untouched import untouched


@dataclass(frozen=True)
class Outside:
    """Multiply-accumulates that one call spends outside of the parts, and the arrays of the whole
    network's embeddings and output layer, wherever they lie."""

    macs: int = 0
    heads: frozenset[str] = frozenset()


def outside(whole: nn.Module, paths: Sequence[str], args: tuple[Any, ...],
            kwargs: Mapping[str, Any]) -> Outside:
    """Run a network once and return what lies outside of its parts."""
    inside, opened = [0], [0]
    makers: dict[int, nn.Module] = {}

    def enter(part: nn.Module, given: object) -> None:
        opened[0] = counter.get_total_flops()

    def leave(part: nn.Module, given: object, result: object) -> None:
        inside[0] += counter.get_total_flops() - opened[0]

    def made(layer: nn.Module, given: object, result: object) -> None:
        makers.update((_storage(x), layer) for x in _tensors(result))

    with untouched(whole), torch.no_grad(), ExitStack() as hooks:
        for path in paths:
            part = whole.get_submodule(path)
            hooks.callback(part.register_forward_pre_hook(enter).remove)
            hooks.callback(part.register_forward_hook(leave).remove)
        for layer in whole.modules():
            script = isinstance(layer, torch.jit.ScriptModule)  # it takes no hooks
            if not script and layer._parameters and not layer._modules:
                hooks.callback(layer.register_forward_hook(made).remove)
        with FlopCounterMode(display=False) as counter:
            results = whole(*args, **kwargs)
    last = {id(makers[at]) for at in map(_storage, _tensors(results)) if at in makers}
    heads = (name for path, layer in whole.named_modules() if _is_head(layer, last)
             for name in _own(path, layer))
    return Outside((counter.get_total_flops() - inside[0]) // 2, frozenset(heads))


def _is_head(layer: nn.Module, last: set[int]) -> bool:
    return isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) or id(layer) in last


def _own(path: str, layer: nn.Module) -> Iterator[str]:
    return (f"{path}.{name}".lstrip(".") for name in layer._parameters)


def _tensors(values: object) -> Iterator[torch.Tensor]:
    return (x for x in pytree.tree_leaves(values) if isinstance(x, torch.Tensor))


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def left_out(whole: nn.Module, paths: Sequence[str]) -> str:
    """Say which sub-modules lie outside of the parts, and what share of the parameters they hold.

    "" if every array lies inside.
    """
    inside = {id(p) for path in paths for p in whole.get_submodule(path).parameters()}
    out = {id(p): p.numel() for p in whole.parameters() if id(p) not in inside}
    if not out:
        return ""
    names: list[str] = []
    for path, part in whole.named_modules():
        own = [id(p) for p in part.parameters()]
        apart = own and all(i in out for i in own)
        if path and apart and not any(path.startswith(f"{n}.") for n in names):
            names.append(path)
    share = sum(out.values()) / sum(p.numel() for p in whole.parameters())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    where = ", ".join(names[:8]) + more if names else "arrays beside the parts"
    return f"not entered, so that {share:.1%} of the parameters stay as they are: {where}"
