"""Seeding for the small models: reproducible weights, and none of them left at a neutral value.

A bias of zero, a gain of one or a running mean of zero hides mistakes: slicing the wrong
channels of such a tensor changes nothing.  So everything constant is redrawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the block and put the global generators back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Redraw every constant parameter and all BatchNorm statistics; return it in eval mode."""
    for parameter in module.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            _redraw(parameter)
    for child in module.modules():
        if isinstance(child, _BatchNorm) and child.running_mean is not None:
            child.running_mean.normal_(0.0, 0.3)
            assert child.running_var is not None
            child.running_var.uniform_(0.5, 1.5)
    return module.eval()


@torch.no_grad()
def randomise_all(module: nn.Module) -> nn.Module:
    """Like `randomise`, with weights redrawn at a scale that keeps the signal alive with depth."""
    for child in module.modules():
        if isinstance(child, _WEIGHTED):
            nn.init.kaiming_normal_(child.weight)
    return randomise(module)


def _redraw(parameter: nn.Parameter) -> None:
    """Zero becomes small noise; any other constant (a gain, a layer scale) becomes about one."""
    if float(parameter.flatten()[0]) == 0.0:
        parameter.normal_(0.0, 0.3)
    else:
        parameter.uniform_(0.5, 1.5)


def images(channels: int = 3, size: int = 32) -> torch.Tensor:
    """A batch of two small images: two, since a batch of one would be specialised when traced.

    Coarse patches under the noise, or a global average pool would make all images alike.
    """
    coarse = torch.randn(2, channels, size // 8, size // 8)
    return F.interpolate(coarse, size=(size, size)) + 0.5 * torch.randn(2, channels, size, size)


def tokens(vocabulary: int, length: int = 9) -> torch.Tensor:
    """A batch of two token rows that keep clear of the low ids often used for padding."""
    return torch.randint(3, vocabulary, (2, length))
