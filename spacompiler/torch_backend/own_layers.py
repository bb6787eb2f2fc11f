"""Transformers models whose layers have sizes of their own, each built from entries of its own.

A stock class builds all of its layers from one configuration. While a class made here is built,
each layer of its lists gets a copy of that configuration with the entries that `per_layer_config`
has for this layer. `own_class` makes such a class of a stock one; `modelling_file` writes the same
for stock transformers to read: the text of `own_init` and `OwnSizes` under a heading. Nothing here
runs a file that lies beside weights.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

from ..errors import SpaError
from .kinds import Config

FILE, PREFIX, STOCK = "modeling_per_layer.py", "PerLayer", "transformers.models."
Lists = tuple[tuple[tuple[type, ...], tuple[str, ...]], ...]
"""Lists of layers: their classes, and the entries with the sizes of each list that is built."""

LOCK = vars(threading).setdefault("_own_sizes", threading.RLock())


def own_init(init: Callable[..., None], keys: Sequence[str], turns: list[Any]) -> Any:
    """Return the `__init__` of a layer that takes the entries of the layer whose turn it is."""

    def build(self: Any, config: Any, *args: object, **kwargs: object) -> None:
        if not turns or turns[-1][0] is not config:
            turns.append([config, -1])
        turns[-1][1] += 1
        own, said = copy.copy(config), config.to_dict().get(keys[len(turns) - 1]) or {}
        for key in ("_heterogeneity_spec", *keys):
            vars(own).pop(key, None)
        for name, value in {int(i): s for i, s in said.items()}.get(turns[-1][1], {}).items():
            setattr(own, name, value)
        init(self, own, *args, **kwargs)
        for part in self.modules():  # what is set later, as attn_implementation, reaches all layers
            if vars(part).get("config") is own:
                part.config = config

    return build


class OwnSizes:
    """A model of transformers whose layers are built with sizes of their own."""

    lists: Any

    def __init__(self, config: Any, *args: object, **kwargs: object) -> None:
        with LOCK, ExitStack() as after:
            for kinds, keys in self.lists:
                turns: list[Any] = []
                for kind in kinds:
                    after.callback(setattr, kind, "__init__", kind.__init__)
                    kind.__init__ = own_init(kind.__init__, keys, turns)
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]


# --- what stays here ------------------------------------------------------------------------------

TEMPLATE = '''"""{title} whose layers have sizes of their own: config.json says which.

Written by spacompiler from one template. Read it, then load with trust_remote_code=True; or call
spacompiler.register() where spacompiler is installed: it does the same without this file.
"""
import copy
import threading
from contextlib import ExitStack

import transformers
{imports}

NAMES = {{{names}}}
LOCK = vars(threading).setdefault("_own_sizes", threading.RLock())


{own_init}


{own_sizes}


for name, auto in NAMES.items():
    kind = type("PerLayer" + name, (OwnSizes, getattr(transformers, name)), {{}})
    kind._auto_class = "AutoModel" + auto
    globals()[kind.__name__] = kind
'''


def stock_of(cls: type) -> Any:
    """Return the class of transformers that a class is, or is made of; None if there is none."""
    return next((c for c in cls.__mro__ if c.__module__.startswith(STOCK)), None)


class _Busy(local):
    """Whether this thread builds a model: the models inside it are built as they are."""

    now = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Be busy for a while."""
        was, self.now = self.now, True
        try:
            yield
        finally:
            self.now = was


BUSY = _Busy()


class _Saved(OwnSizes):
    """One that saves itself in the layout that it was loaded from, code included."""

    def __init__(self, config: Any, *args: object, **kwargs: object) -> None:
        with BUSY():
            super().__init__(config, *args, **kwargs)

    def save_pretrained(self, folder: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, and the file that stock transformers builds it by."""
        super().save_pretrained(folder, *args, **kwargs)  # type: ignore[misc]
        (Path(folder) / FILE).write_text(modelling_file(type(self)), encoding="utf-8")


@cache
def own_class(cls: type, lists: Lists) -> Any:
    """Return a stock class whose layers are built from entries of their own."""
    return type(PREFIX + cls.__name__, (_Saved, cls), {"lists": lists, "__module__": __name__})


def names(cls: type) -> dict[str, str]:
    """Return {automatic class: stock class} of the file of a model's class."""
    import transformers
    from transformers.models.auto import modeling_auto

    stock: Any = stock_of(cls)
    found: dict[str, str] = {}
    for auto in sorted((n for n in vars(modeling_auto) if n.startswith("AutoModel")),
                       key=lambda n: (n == "AutoModelForPreTraining", n)):
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", {})
        said: Any = mapping.get(stock.config_class, ())
        for kind in said if isinstance(said, (list, tuple)) else (said,):
            name = str(getattr(kind, "__name__", ""))
            if getattr(kind, "__module__", "") == stock.__module__ and \
                    getattr(transformers, name, None) is kind:
                found.setdefault(auto, name)
    return found


def auto_map(cls: type) -> dict[str, str]:
    """Return what a configuration says of the file. Raises SpaError if it could not name the class.
    """
    stock: Any = stock_of(cls)
    module = FILE.removesuffix(".py")
    found = {auto: f"{module}.{PREFIX}{name}" for auto, name in names(cls).items()}
    if not any(name.endswith(f".{PREFIX}{stock.__name__}") for name in found.values()):
        raise SpaError("no automatic class of transformers loads this model", where=stock.__name__,
                       why="a configuration names code by these classes", fix="use --layout any")
    return found


def loads(cls: Any) -> str:
    """Say how a model of such a class loads where this compiler is not at hand, and where it is."""
    stock = stock_of(cls).__name__
    auto = next((auto for auto, name in names(cls).items() if name == stock), "AutoModel")
    return f"each layer has its own widths: {auto}.from_pretrained(DIR, trust_remote_code=True) " \
        f"loads it by the {FILE} that lies there; so does {auto}.from_pretrained(DIR) after " \
        "spacompiler.register(), and spacompiler.load(DIR)"


def modelling_file(cls: Any) -> str:
    """Return the text of the file that stock transformers builds a class by."""
    of: dict[str, list[str]] = {}
    for kind in sorted({k for some, _ in cls.lists for k in some}, key=lambda k: k.__qualname__):
        of.setdefault(kind.__module__, []).append(kind.__name__)
    own, sizes = (ast.parse(inspect.getsource(part)) for part in (own_init, OwnSizes))
    lists = tuple((tuple(map(_Name, some)), keys) for some, keys in cls.lists)
    return TEMPLATE.format(
        title=stock_of(cls).__name__,
        imports="\n".join(f"from {module} import {', '.join(k)}" for module, k in of.items()),
        names=_folded("NAMES = {", json.dumps(_first(names(cls)))[1:-1]),
        own_init=ast.unparse(_Untyped(lists).visit(own)),
        own_sizes=ast.unparse(_Untyped(lists).visit(sizes)))


def _first(found: Mapping[str, str]) -> dict[str, str]:
    """Return {class: what its first automatic class is called after AutoModel}."""
    return {name: auto.removeprefix("AutoModel")
            for auto, name in reversed(found.items())}  # type: ignore[call-overload]


class _Name:
    """A class in a tuple that is written as text."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind.__name__


class _Untyped(ast.NodeTransformer):
    """Takes the types off a text; what is typed and has no value is the lists of layers."""

    def __init__(self, lists: object) -> None:
        self.lists = ast.parse(repr(lists), mode="eval").body

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Return the function without its result's type."""
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Return the parameter without its type."""
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.Assign:
        """Return the assignment without its type."""
        return ast.Assign([node.target], node.value or self.lists, lineno=node.lineno)


def _folded(before: str, text: str) -> str:
    """The rest of a line that begins with some text, in lines of at most 100 characters."""
    return textwrap.fill(text, 99, initial_indent=" " * len(before), subsequent_indent=" " * 4,
                         break_long_words=False).strip()


def names_file(config: Config) -> bool:
    """Whether a configuration names the file that this compiler writes, and no other code."""
    said: Mapping[str, Any] = getattr(config, "auto_map", None) or {}
    return bool(said) and all(str(name).rpartition("--")[2].startswith(
        FILE.removesuffix("py")) for name in said.values())
