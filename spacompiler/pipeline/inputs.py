"""Example inputs that a recipe names: a file of them, or the shapes that they are to have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError, did_you_mean
from ..evidence.calibration import from_arrays
from ..evidence.calls import Inputs, as_call
from ..request.recipe import Recipe

FORM = "write NAME=2x3x224x224, or the shape alone where there is one input"


def named_inputs(model: object, made: Inputs, recipe: Recipe) -> Inputs:
    """Return the example inputs that a recipe asks for, else those that there are.

    Raises UsageError for shapes of inputs that the network does not have.
    """
    if recipe.inputs:
        args, kwargs = from_arrays(Path(recipe.inputs), 1).batches[0]
        made = kwargs or args
    if not recipe.input_shape:
        return made
    if isinstance(model, nn.Module):
        return _resized(made, recipe.input_shape, recipe.seed)
    from ..onnx_backend.read import examples

    file: Any = model
    sizes: dict[str, Any] = dict(examples.guess(file, 0))
    return dict(examples.example(file, sizes | shapes(recipe.input_shape, list(sizes)),
                                 recipe.seed))


def shapes(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return shapes by the names of inputs.

    >>> shapes(["x=2x3"], ["x", "y"]), shapes(["4x5"], ["x"])
    ({'x': (2, 3)}, {'x': (4, 5)})
    """
    found = {}
    for text in texts:
        name, equals, shape = text.rpartition("=")
        name = name if equals else names[0] if len(names) == 1 else ""
        if not re.fullmatch(r"\d+(x\d+)*", shape) or "0" in shape.split("x"):
            raise UsageError(f"cannot read input shape {text!r}", fix=FORM)
        if name not in names:
            raise UsageError(f"there is no input {name!r}" if name else
                             f"input shape {text!r} names no input", fix=did_you_mean(name, names))
        found[name] = tuple(map(int, shape.split("x")))
    return found


def _resized(made: Inputs, texts: Sequence[str], seed: int) -> Inputs:
    """Tensors of other shapes: drawn anew, whole numbers from those that stand there."""
    args, kwargs = as_call(made)
    held: dict[str, Any] = {**{f"input{i}": x for i, x in enumerate(args)}, **kwargs}
    wanted = shapes(texts, [n for n, x in held.items() if isinstance(x, torch.Tensor)])
    drawn = {name: _drawn(held[name], shape, seed) for name, shape in wanted.items()}
    return tuple(drawn.get(f"input{i}", x) for i, x in enumerate(args)), \
        {name: drawn.get(name, x) for name, x in kwargs.items()}


def _drawn(like: torch.Tensor, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.dtype)
    flat = like.reshape(-1)
    return flat[torch.randint(0, len(flat), shape, generator=generator)]
