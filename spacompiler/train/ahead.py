"""Several tokens foretold at each position: heads beside the network, for the training alone.

The token k places on is read off h + silu(W h), where h is what the output layer reads, and W a
matrix of its own that starts at zero; the output layer is shared. So each further token costs one
more product with the vocabulary, and what the network holds of later text is asked for at every
position. Heads over one trunk and a shared output layer are those of Gloeckle et al. (2024,
"Better & Faster Large Language Models via Multi-token Prediction"), there of a whole block each;
the residual form is Medusa's (Cai et al. 2024). The heads train and resume with the network, and
are thrown away with the training: nothing of them is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import SpaError, UsageError
from ..evidence.calls import Batch
from ..evidence.losses import cross_entropy, first_floating, following, later
from ..evidence.watching import watched
from .objective import call

Loss = Callable[..., torch.Tensor]


class Ahead:
    """Heads of the tokens 2 … `count` places on; `heads` by name, each (d, d)."""

    def __init__(self, module: nn.Module, loss: Loss, batches: Sequence[Batch],
                 count: int) -> None:
        """Find the output layer, on the first batch.

        Raises:
            UsageError: the results are not logits of next tokens, or a text is too short.
            SpaError: no layer makes the logits.
        """
        check(loss, batches, count)
        self._loss = loss
        self._layer, state = _output(module, batches[0])
        wide = state.shape[-1]
        self.heads = {f"token+{k}": nn.Parameter(state.new_zeros(wide, wide))
                      for k in range(2, count + 1)}
        self._read: list[torch.Tensor] = []

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep what the output layer reads, for the next call of `loss`."""
        self._read.clear()
        with watched({"": self._layer}, lambda path, part, args, *_: self._read.append(args[0])):
            yield

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy of the further tokens, over those that the text has."""
        tokens = following(self._loss, *batch)
        assert tokens is not None
        state = self._read.pop()
        losses = []
        for k, head in enumerate(self.heads.values(), start=2):
            turned = state + functional.silu(functional.linear(state, head))
            losses.append(cross_entropy(self._layer(turned), later(tokens, k)))
        return torch.stack(losses).mean()


def check(loss: object, batches: Sequence[Batch], count: int) -> None:
    """Raise UsageError unless each batch is text that `count` tokens ahead can be foretold in."""
    for args, kwargs in batches:
        tokens = following(loss, args, kwargs)
        if tokens is None:
            raise UsageError(f"ahead={count} foretells tokens, and there are none here",
                             why="the loss is not that of logits of the next token over a sequence",
                             fix="leave ahead out; it is for language models of one stack that "
                                 "learn from the loss that the compiler finds")
        if not all(bool((later(tokens, k) >= 0).any()) for k in range(1, count + 1)):
            raise UsageError(f"ahead={count} needs longer texts",
                             why=f"a batch has {tokens.shape[-1]} tokens a text, or no token that "
                                 f"counts {count} places after another",
                             fix="give longer texts (--length), or a smaller ahead")


def _output(module: nn.Module, batch: Batch) -> tuple[nn.Module, torch.Tensor]:
    """Return the layer whose result has the shape of the logits, and what it reads: (b, n, d)."""
    found: list[tuple[nn.Module, torch.Tensor, object]] = []

    def see(path: str, part: nn.Module, args: tuple[Any, ...], kwargs: object,
            result: object) -> None:
        weight = getattr(part, "weight", None)
        if args and isinstance(args[0], torch.Tensor) and args[0].ndim == 3 \
                and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            found.append((part, args[0], result))

    was = module.training
    try:
        with torch.no_grad(), watched(dict(module.named_modules()), see):
            logits = first_floating(call(module.eval(), *batch))
    finally:
        module.train(was)
    for part, state, result in reversed(found):  # an adapted layer ends after what is within it
        if isinstance(result, torch.Tensor) and result.shape == logits.shape:
            return part, state
    raise SpaError("several tokens are foretold from what the output layer reads",
                   why="no layer of the pruned network makes the logits (it is a re-written "
                       "program, or makes them in another way)", fix="leave ahead out")
