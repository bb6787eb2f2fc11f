"""One step of gradient descent on an adapter, seen as a step of the weight that it adapts.

With theta an adapter's parameters and W'(theta) the merged weight,

    step = [W'(theta) - W'(theta - eta * dL/dtheta)] / eta

needs no gradient of W and no formula per type: two merges do. For LoRA, W' = W + s * B A gives
step = s * (dB A + B dA - eta * dB dA) (LoRAPrune, arXiv 2305.18403), used as it is because the
difference of two merged float32 weights would lose digits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from spacompiler.evidence.protocol import AdapterStep


class AdapterLayer(Protocol):
    """What is used of a layer of peft's; the attributes of LoRA only where it is one."""

    active_adapters: Sequence[str]
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    scaling: Mapping[str, float]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of the adapters and of the layer that they adapt."""

    def double(self) -> AdapterLayer:
        """Turn all arrays to float64, in place."""

    def get_base_layer(self) -> nn.Linear:
        """Return the layer that is adapted."""

    def merge(self) -> None:
        """Add what the adapters do to the layer's own weight, in place."""


def layer_of(module: nn.Module, weight: str) -> AdapterLayer | None:
    """Return the adapter layer (peft's) that wraps the module owning a stored weight, or None."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owner, _, leaf = weight.rpartition(".")
    for path in (owner, owner.removesuffix(".base_layer")):
        layer = module.get_submodule(path)
        if leaf == "weight" and isinstance(layer, BaseTunerLayer):
            return layer
    return None


@torch.no_grad()
def adapted(module: nn.Module, weight: str, *, eta: float = 1.0,
            scaled: bool = True) -> AdapterStep | None:
    """Return the step of a stored weight and its merged value, in the weight's own layout.

    `scaled=False` leaves LoRA's factor s out of the step (as the released code of LoRAPrune
    does; other types have none). None if no adapter on it has gradients.
    """
    layer = layer_of(module, weight)
    if layer is None or not any(p.grad is not None for p in _own(layer)):
        return None
    if _plain_lora(layer):
        return _lora(layer, eta, scaled)
    here = merged(layer)
    return AdapterStep((here - merged(layer, eta)) / eta, here)


def merged(layer: AdapterLayer, eta: float = 0.0) -> torch.Tensor:
    """Return W'(theta - eta * gradient) in float64; the layer is left as it is."""
    twin = copy.deepcopy(layer)
    for mine, other in zip(_own(layer), _own(twin), strict=True):
        other.data = other.data.double()
        if eta and mine.grad is not None:
            other.data -= eta * mine.grad.double()
    twin.double().merge()
    return twin.get_base_layer().weight.detach()


def _own(layer: AdapterLayer) -> list[nn.Parameter]:
    """The adapter's parameters, without those of the layer that it adapts."""
    return [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]


def _plain_lora(layer: AdapterLayer) -> bool:
    """True for LoRA on a linear layer or an ungrouped convolution, with no variant in use."""
    names = [n for n in layer.active_adapters if n in getattr(layer, "lora_A", {})]
    return bool(names) and not getattr(layer, "lora_variant", None) and \
        getattr(layer.get_base_layer(), "groups", 1) == 1 and \
        all(hasattr(layer.lora_A[n], "weight") for n in names)


def _lora(layer: AdapterLayer, eta: float, scaled: bool) -> AdapterStep:
    base = layer.get_base_layer().weight
    turned = getattr(layer, "fan_in_fan_out", False)
    shape = base.T.shape if turned else base.shape
    step = torch.zeros(shape, device=base.device)
    delta = torch.zeros_like(step)
    for name in (n for n in layer.active_adapters if n in layer.lora_A):
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        scale = layer.scaling[name]
        da, db = (_flat(torch.zeros_like(p) if p.grad is None else p.grad) for p in (a, b))
        a, b = _flat(a), _flat(b)
        found = db @ (a - eta * da) + b @ da
        step += (scale * found if scaled else found).reshape(shape)
        delta += (scale * (b @ a)).reshape(shape)
    if turned:
        step, delta = step.T, delta.T
    return AdapterStep(step, base.float() + delta)


def _flat(array: torch.Tensor) -> torch.Tensor:
    return array.detach().float().flatten(1)


def adapter_arrays(module: nn.Module) -> set[str]:
    """Return the names of arrays that belong to peft's adapters (their ranks are no slices)."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            found |= {f"{path}.{name}" for name, _ in layer.named_parameters()
                      if not name.startswith("base_layer.")}
    return found
