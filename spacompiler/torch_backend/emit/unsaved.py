"""A transformers model whose widths no configuration says must not be saved as if one did."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from ...errors import SpaError
from ..kinds import StockModel, is_hf
from .stock import mismatch

NOT_STOCK = (
    "layout any was taken, as no configuration of transformers can say or reach this (uniform or "
    "per-layer): stock transformers does not load what save_pretrained would write of the result; "
    "result.save(DIR) and spacompiler.load(DIR) do; layout='uniform' insists, layout='any' says "
    "that this is wanted")


def refuse_to_save(*args: object, **kwargs: object) -> NoReturn:
    """Stand in for `save_pretrained`. Raises SpaError: the directory would load nowhere."""
    raise SpaError(
        "save_pretrained would write what stock transformers cannot load",
        why="layers of this model have widths of their own, which its configuration cannot say "
            "(layout any)",
        fix="keep the directory that the compile wrote, write module.state_dict() after training, "
            "and load both: spacompiler.load(DIR).load_state_dict(...); or compile with "
            "layout='uniform'")


def refusing(module: nn.Module) -> nn.Module:
    """Let models of transformers refuse `save_pretrained` where no configuration describes them.

    That is a module of layout any itself, and every model inside of it that was cut.
    """
    for part in module.modules():
        if is_hf(part) and (part is module or not described(part)):
            vars(part)["save_pretrained"] = refuse_to_save
    return module


def described(model: StockModel) -> bool:
    """Whether the class of a model makes arrays of these shapes of its configuration."""
    return not mismatch(model, model.config, {
        name: tuple(array.shape) for name, array in model.state_dict().items()})
