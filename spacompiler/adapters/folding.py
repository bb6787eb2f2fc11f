"""Merge adapters that are on a network, and prove that it computes what it did with them beside.

The whole network is compared on a probe. That says little where a network makes much of rounding (a
stream that holds a number of 20,000 beside others of 1 loses four digits): two right ways to sum up
then differ by more than a wrong merge elsewhere. There each layer is judged by itself, on random
inputs and against what its adapter does, and the network's results may differ by no more than they
do when the layers' results change in their last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ProofError, SpaError
from ..stages.proof import relative_error
from ..stages.tolerances import MERGED, MERGED_NOISE, MERGED_ROUNDING, NOISE_FACTOR, OF_EFFECT
from ..system.process import no_warnings

if TYPE_CHECKING:
    from peft import PeftModel

Probe = Callable[[nn.Module], list[Any]]
ROWS = 4
"""Random inputs that a layer is looked at with."""


def fold(tuned: PeftModel, probe: Probe, before: Sequence[Any], *,
         where: str) -> tuple[nn.Module, list[str]]:
    """Merge and unload a PeftModel; raises ProofError if its results on the probe change.

    `before` are the results without the adapter. Returns the module and notes.
    """
    adapted = probe(tuned.eval())
    layers = {path: Layer.of(part) for path, part in tuned.get_base_model().named_modules()
              if hasattr(part, "base_layer")}
    try:
        with no_warnings():
            merged = tuned.merge_and_unload(safe_merge=True)
    except Exception as problem:  # each adapter type refuses in its own way
        raise SpaError("the adapter cannot be merged", where=where, why=said(problem),
                       fix="merge it with peft, save the model, and prune that") from problem
    effect = relative_error(adapted, list(before))
    got = probe(merged)
    error, rounded = relative_error(got, adapted), ""
    if error > _bound(effect):
        rounded = _rounding(merged, layers, probe, got, (error, effect), where)
    merged.eval()
    if not effect:
        return merged, [f"{where}: the adapter changes no result on the example inputs"]
    return merged, [f"{where}: merged; adapter = merged to {error:.1e} "
                    f"(it changes results by {effect:.1e}){rounded}"]


def _bound(effect: float) -> float:
    """What merged results may differ by, where an adapter changes them by `effect`."""
    return min(MERGED.value, max(OF_EFFECT.value * effect, MERGED_ROUNDING.value))


def _rounding(merged: nn.Module, layers: Mapping[str, Layer | None], probe: Probe,
              got: Sequence[Any], seen: tuple[float, float], where: str) -> str:
    """Say that a difference is rounding; raises ProofError where that is not shown.

    `seen` are the error of the results, and the adapter's effect on them.
    """
    error, effect = seen
    worst, path = 0.0, ""
    for name, layer in layers.items():
        share = float("inf") if layer is None else layer.missed(merged.get_submodule(name))
        if share > worst:
            worst, path = share, name
    floor = 0.0
    if worst <= 1:
        with _last_bits({name: merged.get_submodule(name) for name in layers}):
            floor = relative_error(probe(merged), list(got))
        if error <= min(NOISE_FACTOR.value * floor, OF_EFFECT.value * effect, MERGED_NOISE.value):
            return f"; each layer is, and a last bit of theirs changes results by {floor:.1e}"
    raise ProofError(
        "the merged model is not the adapted one", where=f"{where}: {path}" if worst > 1 else where,
        why=f"results differ by {error:.1e} where the adapter changes them by {effect:.1e}" + (
            f"; a last bit of its layers changes them by {floor:.1e}" if floor else ""),
        fix="prune the base without this adapter, and please report it")


@dataclass(frozen=True)
class Layer:
    """What a layer gives for some inputs `x`, with its adapter beside it and without."""

    x: torch.Tensor
    adapted: torch.Tensor
    plain: torch.Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> Layer | None:
        """Look at an adapted layer; None if it is not known what it reads."""
        base: Callable[[], nn.Module] = layer.get_base_layer  # type: ignore[assignment]
        plain: nn.Module = layer.base_layer  # type: ignore[assignment]
        x = _inputs(base())
        if x is None:
            return None
        with torch.no_grad(), no_warnings():
            return cls(x, layer(x), plain(x))

    def missed(self, merged: nn.Module) -> float:
        """How far the merged layer is from the adapted one, in multiples of what is allowed."""
        with torch.no_grad():
            error = relative_error([merged(self.x)], [self.adapted])
        return error / _bound(relative_error([self.adapted], [self.plain]))


def _inputs(layer: nn.Module) -> torch.Tensor | None:
    """Random inputs of a layer with weights, the least that it takes: (ROWS, features)."""
    weight: Any = getattr(layer, "weight", None)
    kind, draws = type(layer).__name__, torch.Generator().manual_seed(0)
    if not isinstance(weight, torch.Tensor):
        return None
    if kind == "Embedding":
        return torch.randint(len(weight), (ROWS,), generator=draws).to(weight.device)
    if kind in ("Linear", "Conv1D") and weight.ndim == 2:
        shape = [ROWS, weight.shape[kind == "Linear"]]
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        shape = [ROWS, layer.in_channels, *(d * (k - 1) + 1 for d, k in zip(
            layer.dilation, layer.kernel_size, strict=True))]
    else:
        return None
    return torch.randn(shape, generator=draws).to(weight)


@contextmanager
def _last_bits(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Change the last bit of all that layers give, up or down at random."""
    draws = torch.Generator().manual_seed(0)

    def change(layer: nn.Module, args: object, result: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(2, result.shape, generator=draws).to(result) * 2 - 1
        return result * (1 + signs * torch.finfo(result.dtype).eps)

    handles = [layer.register_forward_hook(change) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def said(problem: Exception) -> str:
    """The first line of an exception that says something."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")),
                type(problem).__name__)
