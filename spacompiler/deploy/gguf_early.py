"""What a GGUF file asks of a plan, said before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..request.recipe import Recipe
from .gguf_checks import unequal
from .gguf_file import check_writable
from .gguf_table import Arch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SQUARE = ("channel", "expert")
"""Roles that may go where heads times their size are the hidden size."""


def for_gguf(recipe: Recipe, model: PreTrainedModel, notes: list[str]) -> Recipe:
    """Return the recipe with what the model's graph in llama.cpp takes for granted; notes say so.

    Raises SpaError where a model has no such graph, UsageError where what is asked for does not go
    with it.
    """
    arch = check_writable(model)
    return _alike(_square(recipe, arch, notes), arch, model, notes)


def _square(recipe: Recipe, arch: Arch, notes: list[str]) -> Recipe:
    """Let heads and the hidden state stay where the graph has as many columns as both."""
    roles = tuple(role for role in recipe.roles if role in SQUARE)
    if not arch.square or roles == recipe.roles:
        return recipe
    why = f"llama.cpp's {arch.name} has as many columns of queries as the hidden state"
    if not roles:
        raise UsageError(f"{', '.join(recipe.roles)} cannot go with --gguf", why=why,
                         fix="give --role channel, or leave gguf out")
    notes.append(f"only {', '.join(roles)} goes: {why}")
    return replace(recipe, roles=roles)


def _alike(recipe: Recipe, arch: Arch, model: PreTrainedModel, notes: list[str]) -> Recipe:
    """Keep layers alike where the graph sizes them alike."""
    tied = model.config.get_text_config().tie_word_embeddings
    if arch.unequal is not None and (tied or not arch.unequal.tied):
        return recipe
    if recipe.layout == "per-layer":
        unequal(arch, model)
    if recipe.layout != "auto":
        return recipe
    notes.append(f"layout uniform: llama.cpp's {arch.name} sizes all layers alike")
    return replace(recipe, layout="uniform")
