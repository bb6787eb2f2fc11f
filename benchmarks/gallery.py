"""Carry out every recipe of docs/recipes as it stands, and print what came of each.

    python benchmarks/gallery.py [NAME ...]

The large model of three of them is stood in for by a small one, with made-up tokens to read, unless
--whole is given.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import spacompiler
from spacompiler.request.recipe import Recipe

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
SMALL = "zoo:llama-gqa"


def stand_in(recipe: Recipe) -> dict[str, Any]:
    """What is replaced for the small model: tokens, steps and blocks in its proportion."""
    generator = torch.Generator().manual_seed(0)
    tokens = [{"input_ids": torch.randint(0, 60, (2, 12), generator=generator)} for _ in range(4)]
    return {"calibration": tokens, "align": 1,
            **({"schedule": "lora-prune(steps=4)"} if recipe.schedule else {}),
            **({"blocks": "1"} if recipe.blocks else {})}


def onnx_file(folder: Path) -> str:
    """An ONNX file to compile: the zoo's network of linear layers."""
    spacompiler.compile("zoo:mlp", target="params~95%", importance="magnitude", align=1,
                        latency=False, out=folder / "dense")
    return str(folder / "dense" / "model.onnx")


def carry_out(name: str, folder: Path, whole: bool) -> None:
    """Compile by one recipe, verify, and print a line."""
    recipe = Recipe.read(RECIPES / f"{name}.yaml")
    model, more = recipe.model or onnx_file(folder), {}
    if model == "zoo:smollm2-135m" and not whole:
        model, more = SMALL, stand_in(recipe)
    started = time.process_time()
    result = spacompiler.compile(model, recipe=recipe, out=folder / name, **more)
    params = result.plan.costs["params"]
    checks = spacompiler.verify(folder / name, model if model.endswith(".onnx") else None)
    bad = [c.name for c in checks if c.passed is False]
    print(f"{name:20} {params['pruned'] / params['dense']:6.1%} of parameters, "
          f"{time.process_time() - started:5.1f} s CPU,",
          f"wrong: {', '.join(bad)}" if bad else "ok", flush=True)


def main(arguments: list[str]) -> int:
    """Carry out the recipes that are named, or all."""
    whole = "--whole" in arguments
    every = sorted(p.stem for p in RECIPES.glob("*.yaml"))
    names = [a for a in arguments if a != "--whole"] or every
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            carry_out(name, Path(folder), whole)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
