"""Calibration without data: text that a language model makes up, noise for other networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import UsageError
from .frontends.torch_export import Inputs, as_call
from .frontends.untouched import untouched

Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]


def sampled(module: nn.Module, inputs: Inputs, tokenizer: Any, *, samples: int, length: int,
            batch: int, seed: int) -> Batches:
    """Return batches that the model itself, or a random generator, makes.

    A causal language model writes `samples` texts of `length` tokens from its start token, each
    token drawn from its own predictions (LLM-QAT, 2023). Elsewhere every floating-point input is
    drawn from a normal distribution of mean 0 and variance 1, in the shape of the example inputs:
    what a network that was trained on normalised images expects to first order.

    Raises UsageError if inputs are integers that the module cannot make up.
    """
    if tokenizer is not None and callable(getattr(module, "generate", None)):
        ids = _written(module, tokenizer, samples, length, seed)
        return [((), {"input_ids": part}) for part in ids.split(batch)]
    args, kwargs = as_call(inputs)
    generator = torch.Generator().manual_seed(seed)
    return [(tuple(_noise(a, generator) for a in args),
             {k: _noise(v, generator) for k, v in kwargs.items()})
            for _ in range(max(1, samples // batch))]


@torch.no_grad()
def _written(module: Any, tokenizer: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    start = next((i for i in (tokenizer.bos_token_id, module.config.bos_token_id,
                              tokenizer.eos_token_id) if i is not None), None)
    if start is None:
        raise UsageError("the tokenizer has no start token to sample text from",
                         fix="give a calibration text")
    with untouched(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = module.generate(
            torch.full((samples, 1), start), attention_mask=torch.ones(samples, 1).long(),
            do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=length,
            min_new_tokens=length, pad_token_id=start)
    return made[:, 1:]


def _noise(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        raise UsageError("integer inputs cannot be made up",
                         fix="give calibration batches, or --calibration none")
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)
