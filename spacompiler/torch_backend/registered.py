"""Let transformers itself build what was written in layout per-layer, without code from elsewhere.

    spacompiler.register()
    model = AutoModelForCausalLM.from_pretrained("pruned")
"""

from __future__ import annotations

from typing import Any

import torch

from .kinds import Config
from .own_layers import BUSY, PREFIX, OwnSizes, names_file, own_class
from .stacks import as_lists, plain, stacks


def class_for(cls: Any, config: Config) -> Any:
    """Return the class that builds a stock one's layers from entries of their own.

    Raises whatever the stock class raises when it is built.
    """
    with BUSY(), torch.device("meta"):
        module = cls(plain(config))
        return own_class(cls, as_lists(stacks(module)))


def stock_name(architecture: str) -> str:
    """Return the name of the stock class that a class of this compiler's is made of."""
    return architecture.removeprefix(PREFIX)


_ON: list[bool] = []
"""Whether models are built so: a class method that was there once cannot be taken away again."""


def register() -> None:
    """Let models of layout per-layer load without `trust_remote_code`, in this process.

    Any class of transformers that is built from a configuration which names this compiler's file
    builds its layers from entries of their own. The file itself is not read. Other models are built
    as before; a second call does nothing.
    """
    from transformers import PreTrainedModel

    if "__new__" not in vars(PreTrainedModel):
        PreTrainedModel.__new__ = _new  # type: ignore[method-assign, assignment]
    _ON[:] = [True]


def _new(cls: Any, config: Any = None, *args: object, **kwargs: object) -> Any:
    """Make an instance of a class, or of the one made of it."""
    ours = _ON and not BUSY.now and names_file(config) and not issubclass(cls, OwnSizes)
    return object.__new__(class_for(cls, config) if ours else cls)
