"""Which shapes a class of models gives its arrays under a configuration: asked often, built once.

To ask is to build the model without data, which takes a large one a second. Where the layers of a
stack are alike, a model of two of them says what the others' shapes are; that they are is seen
under the module's own configuration. Whoever builds the model in the end checks all of it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..kinds import Config, StockModel
from .stock_search import LAYERS, Key

Shapes = Mapping[str, tuple[int, ...]]
UNSAVED = "(not saved) "
"""What names of buffers that no file holds begin with."""
FEW = 2
"""Layers that stand for all."""
_LAYER = re.compile(r"\.(\d+)\.")


def made_shapes(cls: Callable[..., nn.Module], config: Config) -> Shapes | str:
    """Return the shapes of what a class makes of a config, or what it raised."""
    try:
        return _shapes(cls, config)
    except Exception as problem:  # models of configs that make no sense raise many kinds
        return f"{type(problem).__name__}: {problem}".splitlines()[0]


def _shapes(cls: Callable[..., nn.Module], config: Config) -> Shapes:
    with torch.device("meta"), _as_they_come():
        made = cls(config)
    saved = {n: tuple(t.shape) for n, t in made.state_dict().items()}
    return saved | {UNSAVED + n: tuple(t.shape) for n, t in made.named_buffers()
                    if n not in saved}


def _as_they_come() -> AbstractContextManager[None]:
    """Let models of transformers be made without a thought of what their arrays would hold."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # another version: it takes longer
        return nullcontext()
    without: AbstractContextManager[None] = no_init_weights()
    return without


class Built:
    """Shapes of the arrays that a module's class makes under configurations like its own.

    `likely` are the entries that said other sizes before. `whole` asks for all layers each time:
    where their number is what is in question.
    """

    def __init__(self, module: StockModel, *, whole: bool = False) -> None:
        self._class, self._known = type(module), dict[str, Shapes | str]()
        self._names = list(module.state_dict())
        self._layers = getattr(module.config, "num_hidden_layers", None)
        self._short = not whole and self._is_regular(module)
        self.likely: list[dict[Key, Any]] = []

    def shapes(self, config: Config) -> Shapes | str:
        """Return shapes by name, or what building the model raised."""
        key = json.dumps(config.to_dict(), sort_keys=True, default=repr)
        if key not in self._known:
            few = self._short and getattr(config, "num_hidden_layers", None) == self._layers
            found = made_shapes(self._class, shortened(config) if few else config)
            self._known[key] = self._spread(found) if few and not isinstance(found, str) else found
        return self._known[key]

    def _is_regular(self, module: StockModel) -> bool:
        """Whether few layers say what the module's own arrays are."""
        try:
            found = self._spread(_shapes(self._class, shortened(module.config)))
        except Exception:  # it has no such entry, or the class wants more layers
            return False
        saved = {name: shape for name, shape in found.items() if not name.startswith(UNSAVED)}
        return saved == {name: tuple(t.shape) for name, t in module.state_dict().items()}

    def _spread(self, few: Shapes) -> Shapes:
        """The shapes of all layers from those of the first ones; names that few have are kept."""
        found = dict(few)
        for name in self._names:
            last = _LAYER.sub(f".{FEW - 1}.", name, count=1)
            if name not in few and last in few:
                found[name] = few[last]
        return found


_BUILT: WeakKeyDictionary[nn.Module, tuple[str, Built]] = WeakKeyDictionary()


def built(module: StockModel) -> Built:
    """Return what is known of the shapes that a module's class makes: who decides on a layout, and
    who makes the model of it, ask the same."""
    said = repr((module.config.to_dict(), list(module.state_dict())))
    if module not in _BUILT or _BUILT[module][0] != said:
        _BUILT[module] = said, Built(module)
    return _BUILT[module][1]


def shortened(config: Config) -> Config:
    """Return a copy of a configuration with few layers; raises ValueError if it has no more."""
    made: Any = copy.deepcopy(config)
    entries, count = made.to_dict(), getattr(made, "num_hidden_layers", 0)
    if not isinstance(count, int) or count <= FEW or entries.get(LAYERS):
        raise ValueError("the configuration has no layers to leave out")
    for name, value in entries.items():
        if isinstance(value, list) and len(value) == count:
            setattr(made, name, value[:FEW])
    made.num_hidden_layers = FEW
    short: Config = made
    return short
