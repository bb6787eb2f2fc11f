"""Calibration that a model makes up: its own text, alone or beside a real one; noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ...errors import UsageError
from ...evidence.calibration import begins
from ...evidence.calls import Batch, Inputs, as_call
from ..kinds import StockModel, Tokenizer, is_encoder_decoder, writes_text
from ..untouched import untouched

Batches = list[tuple[tuple[Any, ...], dict[str, Any]]]
PROMPT = 32
AT_ONCE = 64


def sampled(module: nn.Module, inputs: Inputs, tokenizer: Callable[..., Any] | None, *,
            samples: int, length: int, batch: int, seed: int) -> Batches:
    """Return batches that the model itself, or a random generator, makes.

    A causal language model writes `samples` texts of `length` tokens from its start token, each
    token drawn from its own predictions (LLM-QAT, 2023); the start token stays where the tokenizer
    puts one before every text. Elsewhere every floating-point input is
    drawn from a normal distribution of mean 0 and variance 1, in the shape of the example inputs:
    what a network that was trained on normalised images expects to first order. Where batch norms
    say what they met in training, these inputs are changed until they agree (see `agreeing`).

    Raises UsageError if there are no example inputs, or inputs are integers that the module cannot
    make up.
    """
    if tokenizer is not None and writes_text(module):
        start = torch.full((samples, 1), _start(module, cast(Tokenizer, tokenizer)))
        framed = int(callable(tokenizer) and len(begins(tokenizer, "A text.")) > 0)
        ids = _written(module, start, length + 1 - framed, seed)[:, 1 - framed:]
        return [((), {"input_ids": part}) for part in ids.split(batch)]
    args, kwargs = as_call(inputs)
    if not args and not kwargs:
        raise UsageError("inputs cannot be made up", why="there are no example inputs to go by",
                         fix="give --calibration inputs.npz, or example inputs from Python")
    generator = torch.Generator().manual_seed(seed)
    made = [(tuple(_noise(a, generator) for a in args),
             {k: _noise(v, generator) for k, v in kwargs.items()})
            for _ in range(max(1, samples // batch))]
    return agreeing(module, made) if isinstance(module, nn.Module) else made


AGREED = 0.02
STEPS = 80
RATE = 0.1


def agreeing(module: nn.Module, batches: Batches) -> Batches:
    """Return batches changed until batch norms read what they met in training.

    On noise, features have other means, variances and covariances than on data, so that criteria
    and repairs that go by them are led astray. Adam at rate 0.1 changes all floating inputs
    together, to lower the mean over batch norms and channels of (m - mean)^2 / var
    + (s / sqrt(var) - 1)^2 with m, s of the batches and mean, var stored, until it is 2% of what
    it was, for 80 steps at most (as DeepInversion and ZeroQ, CVPR 2020, do). What has no such norm,
    or takes no batch of all examples, is left as it is.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and _has_met(m)]
    leaves, form = pytree.tree_flatten(batches)
    each = len(leaves) // max(len(batches), 1)
    whole = [_together(leaves[i::each]) for i in range(each)]
    moved = [x for x in whole if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not norms or not moved:
        return batches
    args, kwargs = pytree.tree_unflatten(whole, pytree.tree_structure(batches[0]))

    def run() -> None:
        module(*args, **kwargs)

    with untouched(module), torch.enable_grad(), _gaps(norms) as gaps:
        try:
            _agree(moved, run, gaps)
        except (RuntimeError, ValueError, TypeError):  # it fixes how many examples it takes
            return batches
    parts = [x.detach().chunk(len(batches)) if isinstance(x, torch.Tensor) and x.ndim
             else [x] * len(batches) for x in whole]
    flat = [x for own in zip(*parts, strict=True) for x in own]
    return cast(Batches, pytree.tree_unflatten(flat, form))


def _has_met(norm: _BatchNorm) -> bool:
    """Whether a norm holds statistics of anything: not those that it was made with."""
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and bool(
        mean.any() or (variance != 1).any())


def _agree(moved: Sequence[torch.Tensor], run: Callable[[], None],
           gaps: list[torch.Tensor]) -> None:
    """Change tensors, in place, until the mean of the gaps that a run leaves is small."""
    optimizer = torch.optim.Adam([x.requires_grad_() for x in moved], lr=RATE)
    first = 0.0
    for _ in range(STEPS):
        gaps.clear()
        run()
        gap = torch.stack(gaps).mean()
        first = first or float(gap.detach())
        if not float(gap.detach()) > AGREED * first:
            break
        gradients = torch.autograd.grad(gap, list(moved), allow_unused=True)
        for x, g in zip(moved, gradients, strict=True):
            x.grad = g
        optimizer.step()


@contextmanager
def _gaps(norms: Sequence[_BatchNorm]) -> Iterator[list[torch.Tensor]]:
    """Yield a list that holds, once the network has run, how far each batch norm's input is."""
    found: list[torch.Tensor] = []

    def see(norm: _BatchNorm, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].flatten(2) if args[0].ndim > 2 else args[0].unsqueeze(2)
        deviation = (x.var((0, 2), correction=0) + 1e-12).sqrt()
        assert norm.running_mean is not None and norm.running_var is not None
        spread = (norm.running_var + norm.eps).sqrt()
        found.append((((x.mean((0, 2)) - norm.running_mean) / spread).square()
                      + (deviation / spread - 1).square()).mean())

    hooks = [norm.register_forward_pre_hook(see) for norm in norms]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _together(parts: Sequence[Any]) -> Any:
    """Tensors of all batches as one; anything else is that of the first."""
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) and parts[0].ndim \
        else parts[0]


def continued(module: nn.Module, batches: Sequence[Batch], seed: int) -> Batches:
    """Return, for each batch of token windows, as many windows that go on where those end.

    A window is as long as those given: the start token that all of those begin with, if they do,
    their last tokens (32, a quarter of a short window), then what a causal language model draws
    from its own predictions. Text that the model believes in,
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
    given = torch.cat(found)
    prompts = given[:, -max(1, min(PROMPT, length // 4)):]
    if len(given) > 1 and bool((given[:, 0] == given[0, 0]).all()):
        prompts = torch.cat([given[:, :1], prompts[:, 1:]], 1)
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
    new, draws = length - prompts.shape[1], torch.Generator().manual_seed(seed)

    def drawn(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave one token of each row, drawn by its probability: one random number a row."""
        sums = scores.float().softmax(-1).cumsum(-1)
        at = torch.rand(len(sums), 1, generator=draws).to(sums) * sums[:, -1:]
        token = torch.searchsorted(sums, at, right=True).clamp(max=sums.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    with untouched(module):
        made: torch.Tensor = module.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            max_new_tokens=new, min_new_tokens=new, pad_token_id=0, logits_processor=[drawn])
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
