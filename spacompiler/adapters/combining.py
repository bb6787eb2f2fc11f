"""Several adapters become one before they are put on the base: their factors are combined.

A row of `WAYS` is a function of the factors of one layer. All that it needs to know of an adapter
is A (r, i) and B (o, r), its weight and its scale: what is added is weight * scale * B A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import SpaError
from ..request.combinations import parse_combination
from .clusters import clustered
from .files import PREFIX, Adapter
from .kinds import COMBINATION_TRAPS

FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
SUM = "cat"


@dataclass(frozen=True)
class Factors:
    """What one adapter adds to a layer: weight * scale * b a, a (r, i, ...) and b (o, r, ...).

    `seen` are inputs of the layer, (n, i), where a way asks for them.
    """

    a: torch.Tensor
    b: torch.Tensor
    weight: float
    scale: float
    seen: torch.Tensor | None = None

    @property
    def change(self) -> torch.Tensor:
        """weight * scale * b a, (o, i)."""
        return self.weight * self.scale * (self.b.flatten(1) @ self.a.flatten(1))

    @property
    def roots(self) -> tuple[float, float]:
        """The root of the factor on each side, its sign on a."""
        share = self.weight * self.scale
        root = abs(share) ** 0.5
        return root if share >= 0 else -root, root

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors as matrices, each with its root."""
        a, b = self.roots
        return a * self.a.flatten(1), b * self.b.flatten(1)


Pair = tuple[torch.Tensor, torch.Tensor]


# --- the ways ---------------------------------------------------------------------------------


def _cat(parts: Sequence[Factors]) -> Pair:
    """The exact weighted sum: ranks stand side by side."""
    return torch.cat([p.weight * p.scale * p.a.flatten(1) for p in parts]), \
        torch.cat([p.b.flatten(1) for p in parts], 1)


def _of_peft(name: str) -> Callable[..., Pair]:
    """A way of peft's, done to the stacked A and to the stacked B."""

    def combine(parts: Sequence[Factors], **options: object) -> Pair:
        from peft.utils import merge_utils

        _same_rank(parts, name)
        given = {"majority_sign_method" if k == "sign" else k: v for k, v in options.items()}
        way = getattr(merge_utils, name)
        a, b = (way([side.flatten(1) for side in sides], torch.tensor(roots), **given)
                for sides, roots in (([p.a for p in parts], [p.roots[0] for p in parts]),
                                     ([p.b for p in parts], [p.roots[1] for p in parts])))
        return a, b

    return combine


def _svd(parts: Sequence[Factors], rank: int) -> Pair:
    """The nearest of a rank to the weighted sum."""
    u, s, v = torch.linalg.svd(_total(p.change for p in parts), full_matrices=False)
    kept = rank or max(len(p.a) for p in parts)
    return v[:kept], u[:, :kept] * s[:kept]


def _dare(parts: Sequence[Factors], density: float, q: float | str) -> Pair:
    """Drop entries of what is added at random, and divide what stays by q (Yu et al. 2023).

    q is the density, unless it is given; `auto` takes the one whose layer results on the example
    inputs are nearest (Deng et al., DAREx-q, 2024): 1/q = <y, z> / <z, z>, y what the layer's
    results change by and z the same after dropping.
    """
    return full(_total(_dropped(p, density, q) for p in parts))


def _dropped(part: Factors, density: float, q: float | str) -> torch.Tensor:
    change = part.change
    kept = change * torch.bernoulli(torch.full_like(change, density))
    if q != "auto":
        return kept / (float(q) or density)
    assert part.seen is not None
    whole, rest = part.seen @ change.T, part.seen @ kept.T
    power = float((rest * rest).sum())
    return kept * (float((whole * rest).sum()) / power if power else 1 / density)


def _lego(parts: Sequence[Factors], rank: int, output: bool) -> Pair:
    """Cluster rank-one units [a_k; b_k], one rank for each cluster (Zhao et al. 2024).

    A centroid is scaled to the mean norm of its members; with `output`, what is added is scaled by
    sqrt(r / rank), r the largest rank of one adapter. As many clusters as units: the exact sum.
    """
    pairs = [p.balanced() for p in parts]
    units = torch.cat([torch.cat([a, b.T], 1) for a, b in pairs])
    largest = max(len(p.a) for p in parts)
    kept = min(rank or largest, len(units))
    found = clustered(units, kept)
    if output:
        found = found * (largest / kept) ** 0.25  # the root of the factor on each side
    width = parts[0].a.flatten(1).shape[1]
    return found[:, :width], found[:, width:].T


def _fair(parts: Sequence[Factors], ridge: float) -> Pair:
    """Mean factors, B corrected towards the mean of the products (Bian et al., LoRA-FAIR, 2024).

    Weights are made to sum to one. B' = B + (mean(B A) - B A) Aᵀ (A Aᵀ + ridge I)⁻¹ at the means,
    ridge in units of the mean diagonal of A Aᵀ.
    """
    _same_rank(parts, "fair")
    total = sum(p.weight for p in parts)
    if not total:
        raise _cannot("fair", "the weights sum to zero", "give other weights")
    shares = [p.weight / total * p.scale ** 0.5 for p in parts]
    a = _total(s * p.a.flatten(1) for s, p in zip(shares, parts, strict=True))
    b = _total(s * p.b.flatten(1) for s, p in zip(shares, parts, strict=True))
    want = _total(p.change for p in parts) / total
    square = a @ a.T
    square = square + ridge * square.diagonal().mean() * torch.eye(len(a))
    return a, b + torch.linalg.solve(square, a @ (want - b @ a).T).T


WAYS: Mapping[str, Callable[..., Pair]] = {
    "cat": _cat, "linear": _of_peft("task_arithmetic"), "svd": _svd, "ties": _of_peft("ties"),
    "dare_linear": _of_peft("dare_linear"), "dare_ties": _of_peft("dare_ties"), "dare": _dare,
    "lego": _lego, "fair": _fair}


def _total(changes: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(changes)).sum(0)


def full(change: torch.Tensor) -> Pair:
    """Factors of a matrix of any rank: itself, and a unit matrix on its smaller side."""
    o, i = change.shape
    if o < i:
        return change, torch.eye(o, dtype=change.dtype)
    return torch.eye(i, dtype=change.dtype), change


def _same_rank(parts: Sequence[Factors], name: str) -> None:
    ranks = {len(p.a) for p in parts}
    if len(ranks) > 1:
        raise _cannot(name, f"ranks differ: {', '.join(map(str, sorted(ranks)))}",
                      "use cat (the exact weighted sum), svd or lego")


def _cannot(name: str, why: str, fix: str) -> SpaError:
    return SpaError(f"adapters cannot be combined by {name!r}", why=why, fix=fix)


# --- adapters ---------------------------------------------------------------------------------


def combined(adapters: Sequence[Adapter], combine: str, paths: Sequence[str],
             seen: Callable[[Sequence[str]], Mapping[str, torch.Tensor]]) -> Sequence[Adapter]:
    """Return the adapters as one where they must be combined or weighted.

    `paths` are the base's layers in its own order (what is random draws in it); `seen` gives
    inputs of layers, (n, i).

    Raises SpaError for what does not add.
    """
    name, options = parse_combination(combine)
    if len(adapters) == 1 and adapters[0].weight == 1.0 and name == SUM:
        return adapters
    for adapter in adapters:
        _check_adds(adapter, adapters[0].type)
    if adapters[0].kind.adds:
        return [_summed(adapters, name)]
    layers = _layers(adapters, paths)
    if options.get("q") == "auto":
        found = seen([path for path, _ in layers])
        layers = {key: [_watched(p, found[key[0]]) for p in parts] for key, parts in layers.items()}
    return [_lora(adapters, {key: WAYS[name](parts, **options)
                             for key, parts in layers.items()}, layers)]


def _watched(part: Factors, seen: torch.Tensor) -> Factors:
    if part.a.ndim > 2 or seen.shape[-1] != part.a.shape[1]:
        raise _cannot("dare", "q='auto' is for linear layers", "give q as a number")
    return replace(part, seen=seen)


def _check_adds(adapter: Adapter, first: str) -> None:
    reasons = [why for when, why in COMBINATION_TRAPS if when(adapter.config)]
    if adapter.type != "LORA" and not adapter.kind.adds:
        reasons.append(f"{adapter.type} has no factors that add")
    if adapter.type != first:
        reasons.append(f"{adapter.type} does not add to {first}")
    if reasons:
        raise SpaError("adapters cannot be combined or weighted", where=str(adapter.path),
                       why=reasons[0], fix="merge one of them, and give the result as MODEL")


def _summed(adapters: Sequence[Adapter], name: str) -> Adapter:
    """The weighted sum of changes that are linear in the stored arrays (IA3, BEFT)."""
    if name != SUM:
        raise _cannot(name, f"{adapters[0].type} adapters have no factors", "leave --combine out")
    fill, made = adapters[0].kind.fill, dict[str, torch.Tensor]()
    for adapter in adapters:
        for key, tensor in adapter.tensors.items():
            old = made.get(key, torch.full_like(tensor, fill))
            made[key] = old + adapter.weight * (tensor - fill)
    return _joined(adapters, dict(adapters[0].config), made)


def _joined(adapters: Sequence[Adapter], config: dict[str, Any],
            tensors: dict[str, torch.Tensor]) -> Adapter:
    return Adapter(adapters[0].path, 1.0, config, tensors, adapters[0].origin)


Layers = dict[tuple[str, str], list[Factors]]


def _layers(adapters: Sequence[Adapter], paths: Sequence[str]) -> Layers:
    """The factors by (layer, ending of A), layers in the base's order."""
    order = {path: n for n, path in enumerate(paths)}
    found: Layers = {}
    for adapter in adapters:
        used = set()
        for ending, other in FACTORS.items():
            for key in [k for k in adapter.tensors if k.endswith(ending)]:
                path = key.removesuffix(ending).removeprefix(PREFIX)
                pair = key.removesuffix(ending) + other
                used |= {key, pair}
                if pair not in adapter.tensors:
                    raise SpaError(f"{pair} is missing", where=str(adapter.path),
                                   fix="copy the whole directory that was saved")
                found.setdefault((path, ending), []).append(Factors(
                    adapter.tensors[key].float(), adapter.tensors[pair].float(),
                    adapter.weight, scaling(adapter.config, path, len(adapter.tensors[key]))))
        _none_left(adapter, used)
    return dict(sorted(found.items(), key=lambda item: order.get(item[0][0], len(order))))


def _none_left(adapter: Adapter, used: set[str]) -> None:
    left = sorted(k for k in adapter.tensors.keys() - used if ".base_layer." not in k)
    if left:
        raise SpaError("adapters cannot be combined or weighted", where=str(adapter.path),
                       why=f"it is not known how {left[0]} adds",
                       fix="merge one of them, and give the result as MODEL")


def scaling(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return alpha / r of a layer, or alpha / sqrt(r) of rank-stabilised LoRA, as peft takes it."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items()
                  if re.match(rf"(.*\.)?({key})$", path)), config.get("lora_alpha", 8))
    return float(alpha) / (rank ** 0.5 if config.get("use_rslora") else rank)


def _lora(adapters: Sequence[Adapter], made: Mapping[tuple[str, str], Pair], layers: Layers
          ) -> Adapter:
    """One LoRA of the largest rank, others filled with zeros, alpha = rank."""
    rank = max(len(a) for a, _ in made.values())
    tensors = {key: tensor for adapter in adapters for key, tensor in adapter.tensors.items()
               if ".base_layer." in key}
    for (path, ending), (a, b) in made.items():
        like = layers[path, ending][0]
        more = rank - len(a)
        a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
        tensors[f"{PREFIX}{path}{ending}"] = a.reshape(rank, *like.a.shape[1:])
        tensors[f"{PREFIX}{path}{FACTORS[ending]}"] = b.reshape(len(b), rank, *like.b.shape[2:])
    return _joined(adapters, lora_config(adapters[0].config, rank, [p for p, _ in made]), tensors)


def lora_config(first: Mapping[str, Any], rank: int, paths: Sequence[str]) -> dict[str, Any]:
    """A configuration of peft for plain LoRA with alpha = rank on the named layers."""
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
            "target_modules": exactly(paths),
            "fan_in_fan_out": bool(first.get("fan_in_fan_out")), "init_lora_weights": True,
            "inference_mode": True, "task_type": first.get("task_type"),
            "base_model_name_or_path": first.get("base_model_name_or_path")}


def exactly(paths: Sequence[str]) -> str:
    """A pattern of peft's target_modules that matches these paths alone."""
    return "|".join(map(re.escape, dict.fromkeys(paths)))
