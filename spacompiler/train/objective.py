"""What a recovery minimises: the own loss, and how far the pruned network is from the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import SpaError
from ..evidence.calls import Batch
from ..evidence.labels import inputs_only
from ..evidence.losses import default_loss, first_floating
from ..evidence.watching import watched

if TYPE_CHECKING:
    from .options import Schedule
from ..evidence.losses import divergence, labelled

Call = tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]


class Value(NamedTuple):
    """The objective of one batch, the part of it that is the network's own loss, and the mean loss
    of tokens further ahead, where these are foretold."""

    total: torch.Tensor
    loss: torch.Tensor
    further: torch.Tensor | None = None


class Foretold(Protocol):
    """Heads that foretell tokens further ahead."""

    def reading(self) -> AbstractContextManager[None]:
        """Keep what they need of one call of the network."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return their mean loss on the batch of that call."""


class Objective:
    """task · loss + logits · T² KL(dense ‖ pruned) + blocks · mean error of the blocks.

    The dense network runs once a batch, without gradients, and only if it is needed. Where tokens
    further `ahead` are foretold, `further` · their loss is added in training, and told elsewhere.
    """

    def __init__(self, module: nn.Module, dense: nn.Module | None,
                 loss: Callable[..., torch.Tensor], options: Schedule,
                 ahead: Foretold | None = None) -> None:
        self._module, self._dense, self._loss, self._options = module, dense, loss, options
        self._ahead = ahead
        self._logits = options.divergence(loss, dense)
        if (self._logits or options.blocks) and dense is None:
            raise SpaError("distillation needs the dense network", fix="set logits=0 and blocks=0")
        self._pairs: dict[str, tuple[nn.Module, nn.Module]] | None = None

    def __call__(self, batch: Batch) -> Value:
        args, kwargs = batch
        o = self._options
        calls: dict[str, Call] = {}
        logits = self._divergence(kwargs)
        teacher = self._taught(args, kwargs, calls) if logits or o.blocks else None
        zero = torch.zeros(())
        with self._ahead.reading() if self._ahead else nullcontext():
            runs = o.task or logits or self._ahead
            outputs = call(self._module, args, kwargs) if runs else []
        wanted = o.task or not torch.is_grad_enabled()  # else only the divergence trains
        loss = self._own(outputs, args, kwargs) if outputs and wanted else zero
        total = o.task * loss if o.task else zero
        if logits and teacher is not None:
            total = total + logits * divergence(first_floating(outputs), teacher, o.temperature)
        if o.blocks:
            total = total + o.blocks * self._blocks(calls)
        further = self._ahead.loss(batch) if self._ahead else None
        if further is not None and torch.is_grad_enabled():
            total = total + o.further * further
        return Value(total, loss.detach(), further)

    def _divergence(self, kwargs: Mapping[str, Any]) -> float:
        """Return its weight for one batch: none that nobody asked for where labels are values."""
        labels = kwargs.get("labels")
        values = isinstance(labels, torch.Tensor) and labels.is_floating_point()
        return 0.0 if values and self._options.logits is None else self._logits

    def _own(self, outputs: list[Any], args: tuple[Any, ...],
             kwargs: Mapping[str, Any]) -> torch.Tensor:
        if self._loss is default_loss and "labels" in kwargs:  # no head is known
            return labelled(first_floating(outputs), kwargs["labels"])
        return self._loss(outputs, args, kwargs)

    def _taught(self, args: tuple[Any, ...], kwargs: dict[str, Any],
                calls: dict[str, Call]) -> torch.Tensor:
        assert self._dense is not None
        parts = {path: pair[1] for path, pair in self._paired(args, kwargs).items()} \
            if self._options.blocks else {}
        with torch.no_grad(), _recorded(parts, calls), _eval(self._dense):
            return first_floating(call(self._dense, args, kwargs))

    def _blocks(self, calls: Mapping[str, Call]) -> torch.Tensor:
        """Mean over blocks of |f(x) - y|² / |y|², x and y the dense block's input and result."""
        assert self._pairs is not None
        errors = []
        for path, (args, kwargs, want) in calls.items():
            got = first_floating(pytree.tree_leaves(self._pairs[path][0](*args, **kwargs)))
            errors.append((got - want).square().sum() / want.square().sum().clamp_min(1e-12))
        return torch.stack(errors).mean()

    def _paired(self, args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> dict[str, tuple[nn.Module, nn.Module]]:
        """Blocks by path, in the pruned and the dense network, whose inputs and results agree."""
        if self._pairs is None:
            assert self._dense is not None
            theirs = dict(blocks(self._dense))
            found: dict[str, tuple[nn.Module, nn.Module]] = {
                p: (b, theirs[p]) for p, b in blocks(self._module) if p in theirs}
            ours: dict[str, Call] = {}
            dense: dict[str, Call] = {}
            with torch.no_grad(), _eval(self._module), _eval(self._dense):
                with _recorded({p: pair[0] for p, pair in found.items()}, ours):
                    call(self._module, args, kwargs)
                with _recorded({p: pair[1] for p, pair in found.items()}, dense):
                    call(self._dense, args, kwargs)
            self._pairs = {p: pair for p, pair in found.items()
                           if p in ours and p in dense and _shapes(ours[p]) == _shapes(dense[p])}
            if not self._pairs:
                raise SpaError("blocks cannot be distilled one by one",
                               why="no block of the pruned network takes and gives what the dense "
                                   "one does (the stream between them was pruned too)",
                               fix="use logits instead of blocks")
        return self._pairs


def _shapes(found: Call) -> list[Any]:
    return [tuple(x.shape) for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]


def call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the flat results of a call, labels left out."""
    made = module(*args, **inputs_only(module, kwargs))
    return [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]


def blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the members of the longest list or sequence of modules, by path."""
    best, name = 0, ""
    for path, part in module.named_modules():
        if isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) > best:
            best, name = len(part), path
    if best:
        for key, block in module.get_submodule(name).named_children():
            yield f"{name}.{key}" if name else key, block


def _recorded(parts: Mapping[str, nn.Module],
              calls: dict[str, Call]) -> AbstractContextManager[None]:
    """Keep what each of some modules is given and gives, for one forward."""

    def keep(path: str, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
             result: object) -> None:
        if any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves((args, kwargs))):
            calls[path] = (args, kwargs, first_floating(pytree.tree_leaves(result)))

    return watched(parts, keep)


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
