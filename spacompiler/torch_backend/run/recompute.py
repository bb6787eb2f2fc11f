"""Hold less for the backward pass: products are held, what is cheap between them is made again.

A program runs segment by segment. Of each, backward finds what enters it and the results of matrix
products, convolutions and attention; norms, activations, gates and products of elements are
computed a second time when backward gets there (selective checkpointing: Chen et al., 2016;
Korthikanti et al., MLSys 2023). Results are the same to the bit. Nothing here knows blocks or
layers: a segment ends where the fewest values are alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ...graph.ir import Graph
from ...store.mapped import let_go
from ...system.heap import give_back

FEW, LEAST, WHOLE = 1 << 26, 1 << 28, 3 << 27
"""Bytes: of values that are held, however few weights there are; of dear ones; of the values of the
last segments."""
# the dear operators: computing them again would cost a large part of a forward pass
HELD = frozenset("aten::" + name for name in (
    "mm addmm bmm baddbmm convolution mkldnn_convolution mkldnn_linear cudnn_convolution "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention").split())

Segment = list[fx.Node]


def segments(graph: fx.Graph) -> list[Segment]:
    """Split a graph's nodes, placeholders and output left out, where the fewest values are alive.

    There are about sqrt(n) / 2 segments of n nodes: what enters them is small then, and so is
    what one of them holds.
    """
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    alive = _alive(nodes)
    size = 2 * isqrt(len(nodes)) or 1
    cuts = [min(range(at, min(at + size, len(nodes))), key=lambda i: (alive[i], -i)) + 1
            for at in range(0, len(nodes), size)]
    return [nodes[a:b] for a, b in zip([0, *cuts], [*cuts, len(nodes)], strict=True) if b > a]


def _alive(nodes: Segment) -> list[int]:
    """How many values that nodes made are still to be read after each node."""
    order = {node: i for i, node in enumerate(nodes)}
    last = [max((order.get(u, len(nodes)) for u in n.users), default=i)
            for i, n in enumerate(nodes)]
    change = [0] * (len(nodes) + 1)
    for i, end in enumerate(last):
        change[i] += 1
        change[end] -= 1
    alive, now = [], 0
    for step in change[:-1]:
        now += step
        alive.append(now)
    return alive


def borders(segment: Segment) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes whose values a segment reads, and those of its own that others read."""
    own = set(segment)
    entering = dict.fromkeys(s for n in segment for s in n.all_input_nodes if s not in own)
    return list(entering), [n for n in segment if any(u not in own for u in n.users)]


@dataclass
class Budget:
    """How many bytes of dear results may be held: beyond that they too are computed again.

    Of segments the share `whole` at the end holds all: backward comes to them first.
    """

    left: int
    whole: float = 0.0

    def last(self, count: int) -> int:
        """How many of some segments hold all: the last one at least, whose end is the loss."""
        return 1 + int(self.whole * (count - 1))

    def policy(self, context: SelectiveCheckpointContext, op: torch._ops.OpOverload,
               *args: object, **kwargs: object) -> CheckpointPolicy:
        """Say what is to be done with an operator's result."""
        if op.name().partition(".")[0] not in HELD or self.left <= 0:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.left -= sum(x.nbytes for x in pytree.tree_leaves(context.op_output)
                         if isinstance(x, torch.Tensor))
        return CheckpointPolicy.MUST_SAVE


def budget(graph: Graph, traced: object, batch: object, whole: int = WHOLE,
           least: int = LEAST) -> Budget | None:
    """Return what may be held for a batch, or None if its activations are `FEW`.

    Of the last segments `whole` bytes of values are.

    What may be held is an eighth of what the weights take, and at least `least`: while products fit
    into that, the rest costs little to compute again. Activations are estimated by the
    traced sizes, in proportion to the inputs' sizes.
    """
    share = sum(prod(t.shape) for t in graph.weights().values())
    allowed = max(least, share // 2)  # an eighth of four bytes each
    made = sum(prod(t.shape) for t in graph.tensors.values()
               if t.kind == "value" and not t.static)
    every = 4 * made * elements(batch) / max(1, elements(traced))
    return Budget(allowed, min(1.0, whole / every)) if every > FEW else None


def elements(call: object) -> int:
    """Return how many numbers the tensors of a call hold."""
    return sum(v.numel() for v in pytree.tree_leaves(call) if isinstance(v, torch.Tensor))


def recomputed(run: Callable[..., Any], *values: object, held: Budget,
               again: Callable[[bool], None] = lambda now: None,
               named: Mapping[str, Any] | None = None) -> Any:
    """Call `run`, holding what the budget lets; `again(True)` says that it is run once more.

    `named` are its arguments by keyword.
    """
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        first, second = create_selective_checkpoint_contexts(held.policy)
        return first, _marked(second, again)

    return checkpoint(run, *values, use_reentrant=False, context_fn=contexts,
                      preserve_rng_state=False, **(named or {}))


@contextmanager
def lean_blocks(blocks: Iterable[nn.Module], held: Budget | None) -> Iterator[None]:
    """Let modules hold less while they run as they are (not as a program), without dropout.

    Arrays that are shown out of a file are let go once a module has run, forward and backward.
    """
    def lean(forward: Callable[..., Any], at: int, *args: object, **kwargs: object) -> Any:
        plain = all(x is None or isinstance(x, (torch.Tensor, bool, int, float, str))
                    for x in pytree.tree_leaves((args, kwargs)))  # no cache that would grow twice
        if not plain or held is None:
            return forward(*args, **kwargs)
        results = recomputed(forward, *args, held=held, named=kwargs, again=partial(leave, at))
        let_go(wrapped[at].parameters())
        if at == len(wrapped) - 1:
            give_back()
        return results

    def leave(at: int, now: bool) -> None:
        """Where a block is computed again, backward is through with the one after it."""
        let_go(p for block in wrapped[at + 1:at + 2] for p in block.parameters() if now)

    wrapped = list(blocks) if held is not None else []
    for at, block in enumerate(wrapped):
        run = partial(lean, block.forward, at)
        block.forward = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in wrapped:
            del block.forward
        let_go(p for block in wrapped for p in block.parameters())


@contextmanager
def _marked(inner: AbstractContextManager[None],
            again: Callable[[bool], None]) -> Iterator[None]:
    give_back()
    again(True)
    try:
        with inner:
            yield
    finally:
        again(False)
