"""Checkpoints of transformers, and example inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import SpaError
from ..evidence.calls import Inputs
from ..store import beside
from ..torch_backend import pretrained
from ..torch_backend.kinds import is_encoder_decoder
from ..torch_backend.own_layers import names_file
from ..torch_backend.registered import class_for, stock_name
from .source import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def from_transformers(name: str, folder: Path, trust: bool = False,
                      unused: Iterable[str] = ()) -> Source:
    """Read a checkpoint of transformers with its tokenizer; raises SpaError if it is not whole."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), trust_remote_code=trust, local_files_only=True)
    except Exception as problem:  # transformers raises many kinds
        raise SpaError(f"cannot load {name!r} with transformers",
                       why=str(problem).strip().splitlines()[0],
                       fix="read that code, and let it run by --trust-remote-code"
                       if "trust_remote_code" in str(problem) else
                       "give a directory with config.json and model.safetensors, or a hub id"
                       ) from problem
    module, report = pretrained.load(folder, _model_class(transformers, config), config,
                                     trust=trust, unused=unused)
    facts, notes = pretrained.facts(folder, module, report)
    tokenizer, unread = _tokenizer(transformers, folder, trust)
    return Source(name, module, example_inputs(module), tokenizer, folder=folder, facts=facts,
                  notes=[*notes, *unread], sound=True)


def _model_class(transformers: ModuleType, config: PretrainedConfig) -> Any:
    """The class that the checkpoint was saved from, else causal LM."""
    for name in getattr(config, "architectures", None) or ():
        if names_file(config) and hasattr(transformers, stock_name(name)):
            return class_for(getattr(transformers, stock_name(name)), config)
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _tokenizer(transformers: ModuleType, folder: Path, trust: bool) -> tuple[Any, list[str]]:
    """The tokenizer beside a model, if there is one, and a note where it cannot be loaded."""
    if not beside.has_tokenizer(folder):
        return None, []
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust, local_files_only=True), []
    except Exception as problem:  # it raises many kinds
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return None, [f"the tokenizer cannot be loaded, so no text can be read: {why}"]


def example_inputs(module: PreTrainedModel) -> Inputs:
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
