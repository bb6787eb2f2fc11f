"""The models on which other tools are compared: six of torchvision, two language models.

`heads` says, of a module, what other tools have to be told: how many heads stand in which layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]


def _classifier(name: str) -> Built:
    import tiny_torchvision  # noqa: F401  (it makes torchvision importable without its library)
    import torchvision

    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(weights=None)
    return module.eval(), (torch.randn(2, 3, 224, 224),)


def _llama(layers: int) -> Built:
    with suppress(ImportError):  # transformers imports torchvision where it finds one
        import tiny_torchvision  # noqa: F401
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    module = LlamaForCausalLM(LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, vocab_size=8000))
    return module.eval(), {"input_ids": torch.randint(0, 8000, (2, 9)), "use_cache": False}


MODELS: dict[str, Callable[[], Built]] = {
    **{name: partial(_classifier, name) for name in (
        "mobilenet_v2", "resnet50", "convnext_tiny", "densenet121", "efficientnet_b0",
        "vit_b_16")},
    "llama-2-layers": partial(_llama, 2), "llama-8-layers": partial(_llama, 8)}


def heads(module: nn.Module) -> dict[nn.Module, int]:
    """Return the number of heads by layer: of attention modules, and of q, k and v products."""
    found: dict[nn.Module, int] = {}
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            found[part] = part.num_heads
        elif hasattr(part, "q_proj"):
            size = part.head_dim
            found |= {p: p.out_features // size for p in (part.q_proj, part.k_proj, part.v_proj)}
    return found


def output(module: nn.Module) -> list[nn.Module]:
    """Return the layer that gives the classes or words: what no tool is to prune."""
    return [[part for part in module.modules() if isinstance(part, nn.Linear)][-1]]


def mended(module: nn.Module) -> None:
    """Bring an attribute in step that a vision transformer checks: by hand, on the other side."""
    if hasattr(module, "conv_proj") and hasattr(module, "hidden_dim"):
        module.hidden_dim = module.conv_proj.out_channels
