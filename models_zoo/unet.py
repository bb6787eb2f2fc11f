"""U-Net: transposed convolutions (weights stored input first) and long skips that concatenate."""

from __future__ import annotations

import torch
from torch import nn

from spacompiler.models_zoo._seeded import images, randomise_all, seeded


def _double(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down, two up, and one value per pixel and class."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = _double(3, 8, 10)
        self.down2 = _double(10, 14, 18)
        self.bottom = _double(18, 22, 26)
        self.up2 = nn.ConvTranspose2d(26, 16, 2, stride=2)
        self.merge2 = _double(16 + 18, 20, 15)
        self.up1 = nn.ConvTranspose2d(15, 9, 2, stride=2)
        self.merge1 = _double(9 + 10, 12, 11)
        self.classify = nn.Conv2d(11, 5, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.down1(x)
        low = self.down2(self.pool(high))
        y = self.bottom(self.pool(low))
        y = self.merge2(torch.cat([self.up2(y), low], dim=1))
        y = self.merge1(torch.cat([high, self.up1(y)], dim=1))
        return self.classify(y)


def build(seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The network and two images."""
    with seeded(seed):
        return randomise_all(UNet()), (images(),)
