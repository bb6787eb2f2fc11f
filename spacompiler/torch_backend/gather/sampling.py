"""Calibration that a model makes up: its own text, alone or beside a real one; noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ...errors import UsageError
from ...evidence.calls import Batch, Inputs, as_call
from ..kinds import StockModel, Tokenizer, is_encoder_decoder, writes_text
from ..untouched import untouched

Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]
PROMPT = 32
AT_ONCE = 32


def sampled(module: nn.Module, inputs: Inputs, tokenizer: Callable[..., Any] | None, *,
            samples: int, length: int, batch: int, seed: int) -> Batches:
    """Return batches that the model itself, or a random generator, makes.

    A causal language model writes `samples` texts of `length` tokens from its start token, each
    token drawn from its own predictions (LLM-QAT, 2023). Elsewhere every floating-point input is
    drawn from a normal distribution of mean 0 and variance 1, in the shape of the example inputs:
    what a network that was trained on normalised images expects to first order.

    Raises UsageError if there are no example inputs, or inputs are integers that the module cannot
    make up.
    """
    if tokenizer is not None and writes_text(module):
        start = torch.full((samples, 1), _start(module, cast(Tokenizer, tokenizer)))
        ids = _written(module, start, length + 1, seed)[:, 1:]
        return [((), {"input_ids": part}) for part in ids.split(batch)]
    args, kwargs = as_call(inputs)
    if not args and not kwargs:
        raise UsageError("inputs cannot be made up", why="there are no example inputs to go by",
                         fix="give --calibration inputs.npz, or example inputs from Python")
    generator = torch.Generator().manual_seed(seed)
    return [(tuple(_noise(a, generator) for a in args),
             {k: _noise(v, generator) for k, v in kwargs.items()})
            for _ in range(max(1, samples // batch))]


def continued(module: nn.Module, batches: Sequence[Batch], seed: int) -> Batches:
    """Return, for each batch of token windows, as many windows that go on where those end.

    A window is as long as those given: their last tokens (32, a quarter of a short window), then
    what a causal language model draws from its own predictions. Text that the model believes in,
    on the subjects of the calibration's, keeps least squares from fitting the latter too closely.

    Raises UsageError if the module writes no text, or the batches are no windows of tokens.
    """
    refusal = UsageError(
        "this calibration cannot be continued",
        why="a causal language model of transformers is needed, and windows of token ids "
            "(input_ids and nothing else) of one length", fix="leave continuing out")
    found = [kwargs["input_ids"] for args, kwargs in batches
             if not args and set(kwargs) == {"input_ids"}]
    lengths = {ids.shape[1] for ids in found if ids.ndim == 2}
    if not writes_text(module) or len(lengths) != 1 \
            or len(found) != len(batches) or is_encoder_decoder(module):
        raise refusal
    length = lengths.pop()
    prompts = torch.cat(found)[:, -max(1, min(PROMPT, length // 4)):]
    made = torch.cat([_written(module, part, length, seed + i)
                      for i, part in enumerate(prompts.split(AT_ONCE))])
    return [((), {"input_ids": part}) for part in made.split([len(ids) for ids in found])]


def _start(module: StockModel, tokenizer: Tokenizer) -> int:
    for token in (tokenizer.bos_token_id, module.config.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError("the tokenizer has no start token to sample text from",
                     fix="give a calibration text")


@torch.no_grad()
def _written(module: StockModel, prompts: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """Return prompts (n, tokens) written on to `length` tokens."""
    new = length - prompts.shape[1]
    with untouched(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: torch.Tensor = module.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    return made


def _noise(value: object, generator: torch.Generator) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        raise UsageError("integer inputs cannot be made up",
                         fix="give calibration batches, or --calibration none")
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)
