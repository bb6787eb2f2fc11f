"""Networks of little-used packages, at small sizes, with random weights: package_networks.txt.

Its lines say: name | module to import as `m` | the network | what it is called with. `f` draws
floats of a shape, `ints` numbers below a bound; their first dimension is the batch unless it is
`fixed`. The packages stand, pinned, in package_pins.txt:

    pip install --no-deps --target DIR -r benchmarks/package_pins.txt
    PYTHONPATH=DIR python benchmarks/coverage.py packages
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny_torchvision  # noqa: F401  (packages import torchvision, which needs what is done there)
import torch
from torch import nn

from spacompiler.models_zoo._seeded import randomise, seeded

TABLE = Path(__file__).with_suffix(".txt")
PINS = Path(__file__).with_name("package_pins.txt")


@dataclass(frozen=True)
class Spec:
    """A tensor to draw: floats, or integers below `high`."""

    shape: tuple[int, ...]
    high: int = 0
    fixed: bool = False
    positive: bool = False

    def draw(self, more: int = 0) -> torch.Tensor:
        """Draw it, with `more` examples than it says."""
        shape = (self.shape[0] + (0 if self.fixed else more), *self.shape[1:])
        if self.high:
            return torch.randint(0, self.high, shape)
        return torch.rand(shape) if self.positive else torch.randn(shape)


def f(*shape: int, **options: Any) -> Spec:
    """Normal floats of a shape."""
    return Spec(shape, **options)


def ints(high: int, *shape: int, **options: Any) -> Spec:
    """Numbers below `high`."""
    return Spec(shape, high, **options)


class Picked(nn.Module):
    """A network of which one result, or one method, is wanted."""

    def __init__(self, net: nn.Module, pick: Callable[[Any], Any], method: str = "") -> None:
        super().__init__()
        self.net, self.pick, self.method = net, pick, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self.net, self.method) if self.method else self.net
        return self.pick(call(*args, **kwargs))


class Diffusion(nn.Module):
    """A denoiser that returns an object with a `sample`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs).sample


class Graph(nn.Module):
    """Two dense graph convolutions."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x, near).relu(), near)


WORDS: dict[str, Any] = {
    "torch": torch, "nn": nn, "f": f, "ints": ints, "Picked": Picked, "Diffusion": Diffusion,
    "Graph": Graph, "IMAGE": f(2, 3, 64, 64), "ADJ": f(2, 10, 10, positive=True),
    "SMP": {"encoder_name": "resnet18", "encoder_weights": None},
    "VIT": {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 48, "depth": 2,
            "heads": 4, "mlp_dim": 96},
    "EEG": {"n_chans": 8, "n_outputs": 3, "n_times": 256},
    "BLOCKS": {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
}
"""What the lines of the table may use."""


def build(module: str, network: str, inputs: str) -> tuple[nn.Module, Any]:
    """Import, make from seed 0, redraw constants, and draw the inputs."""
    with seeded(0):
        made = eval(network, WORDS | {"m": importlib.import_module(module)})
        return randomise(made), draw(inputs)


def draw(inputs: str, more: int = 0) -> Any:
    """Draw the inputs of a line, with `more` examples than it says."""
    return torch.utils._pytree.tree_map(
        lambda x: x.draw(more) if isinstance(x, Spec) else x, eval(inputs, WORDS),
        is_leaf=lambda x: isinstance(x, Spec))


def entries() -> dict[str, tuple[str, str, str]]:
    """The lines of the table by name: (module, network, inputs)."""
    rows = (line.split(" | ") for line in TABLE.read_text().splitlines()
            if line and not line.startswith("#"))
    return {name: (module, network, inputs) for name, module, network, inputs in rows}


ENTRIES = entries()
MODELS = {name: partial(build, *entry) for name, entry in ENTRIES.items()}
