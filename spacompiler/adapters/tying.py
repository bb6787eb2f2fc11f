"""Layers that share an array, and adapters on one or on both of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..stages.tolerances import TIED
from .combining import FACTORS, exactly
from .files import PREFIX, Adapter

if TYPE_CHECKING:
    from peft import PeftModel


def copied(tuned: PeftModel) -> PeftModel:
    """A copy of a PeftModel; tensors that peft keeps beside its arrays are cut from their graph."""
    memo = {id(x): x.detach().clone() for part in tuned.modules()
            for x in pytree.tree_leaves(part.__dict__.get("kwargs", {}))
            if isinstance(x, torch.Tensor) and not x.is_leaf}
    return copy.deepcopy(tuned, memo)


@dataclass(frozen=True)
class Pair:
    """Two layers that shared an array; `said` is whether the configuration spoke of it."""

    path: str
    other: str
    said: bool

    def stripped(self) -> Pair:
        """The same, by the names that the layers have in the base of a PeftModel."""
        path, other = (p.removeprefix(PREFIX).replace(".base_layer", "")
                       for p in (self.path, self.other))
        return Pair(path, other, self.said)


def untied(module: nn.Module, touched: Set[str]) -> list[Pair]:
    """Give each touched layer its own copy of an array that it shares; returns the pairs."""
    owners: dict[int, str] = {}
    pairs, config = [], getattr(module, "config", None)
    said = bool(getattr(config, "tie_word_embeddings", False))
    for name, p in list(module.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        other = owners.setdefault(id(p), path)
        if other == path or not {path, other} & touched:
            continue
        setattr(module.get_submodule(path), leaf, nn.Parameter(p.detach().clone()))
        if said:
            config.tie_word_embeddings = False  # type: ignore[union-attr]
        pairs.append(Pair(path, other, said))
    return pairs


def tied_again(merged: nn.Module, pairs: Sequence[Pair]) -> list[str]:
    """Tie layers again whose arrays came out as one; returns notes on the others."""
    notes = []
    for pair in pairs:
        mine, theirs = (merged.get_submodule(p) for p in (pair.path, pair.other))
        a, b = mine.get_parameter("weight"), theirs.get_parameter("weight")
        if (a - b).abs().max() > TIED.value * b.abs().max():
            notes.append(f"{pair.path} was untied from {pair.other}: an adapter changes only one "
                         "of them")
            continue
        mine.weight = b
        if pair.said:
            merged.config.tie_word_embeddings = True  # type: ignore[union-attr]
    return notes


def own_factors(module: nn.Module, adapter: Adapter) -> Adapter:
    """An adapter that ties its factors of an embedding and of the output layer has each as its own.

    peft derives the second from the first, where its base is tied: (B A)ᵀ = Aᵀ Bᵀ.
    """
    if not adapter.config.get("ensure_weight_tying"):
        return adapter
    tensors, key = dict(adapter.tensors), ".lora_embedding_A"
    owners = [(path, p) for name, p in module.named_parameters(remove_duplicate=False)
              if (path := name.removesuffix(".weight")) != name]
    for a in [k for k in tensors if k.endswith(key)]:
        path = a.removesuffix(key).removeprefix(PREFIX)
        weight = dict(owners).get(path)
        for other in [q for q, p in owners if p is weight and q != path]:
            to = f"{PREFIX}{other}.lora_"
            tensors.setdefault(f"{to}A.weight", tensors[f"{a[:-1]}B"].T.contiguous())
            tensors.setdefault(f"{to}B.weight", tensors[a].T.contiguous())
    paths = [k.removesuffix(e).removeprefix(PREFIX) for k in tensors for e in FACTORS
             if k.endswith(e)]
    config = {**adapter.config, "ensure_weight_tying": False,
              "target_modules": exactly(paths)}
    return replace(adapter, config=config, tensors=tensors)
