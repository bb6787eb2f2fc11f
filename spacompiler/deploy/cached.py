"""Whether a language model is written with its key/value cache, as its runtime wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import nn

from ..errors import SpaError, UsageError
from ..request.profiles import profile
from ..request.recipe import Recipe
from ..torch_backend.kinds import is_encoder_decoder, writes_text
from .decoder import check_causal_lm
from .encoder_decoder import check_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_cache(recipe: Recipe, model: nn.Module) -> Recipe:
    """Return the recipe, with a cache where the runtime asked for wants one of a language model.

    Raises UsageError for a runtime that loads other files of an encoder-decoder than are written,
    SpaError where a cache is asked for and the model has none.
    """
    row, both = profile(recipe.runtime), is_encoder_decoder(model)
    if both and recipe.onnx and (row.cached or row.options.get("decoder")):
        raise UsageError(f"--for {recipe.runtime} cannot hold an encoder-decoder",
                         where=type(model).__name__,
                         why="it loads files of such models by other names and inputs than "
                             "encoder.onnx and decoder.onnx have",
                         fix="give --decoder without --for, and run them with "
                             "spacompiler.runtime.EncoderDecoder")
    if recipe.decoder:
        (check_encoder_decoder if both else check_causal_lm)(cast("PreTrainedModel", model))
    elif row.cached and recipe.onnx and isinstance(model, nn.Module) and writes_text(model):
        try:
            check_causal_lm(cast("PreTrainedModel", model))
        except SpaError as problem:
            raise SpaError(f"--for {recipe.runtime} wants a cache, and there can be none",
                           where=problem.where, why=problem.why,
                           fix="compile without --for") from problem
        recipe = replace(recipe, decoder=True)
    return recipe
