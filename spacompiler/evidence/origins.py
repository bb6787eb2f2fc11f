"""Stored arrays behind operands: through views of them, and where data says which is read.

A transposed or cast weight is still that weight; of experts that data chooses between, each
sample meets one, which a `Route` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from ..graph.idioms import moved
from ..graph.ir import Graph, Node

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Which index along dimension `dim` of a stored array each sample meets, out of `count`.

    `tensor`, as `node` reads it, holds one for each sample; with `ends`, samples are in order and
    it says where those of each index end.
    """

    node: str
    tensor: str
    dim: int
    count: int
    ends: bool = False

    def deal(self, rows: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Deal rows (samples, n) out: (count, most samples, n), zeros after the last one of each,
        and how many there are (count,)."""
        if self.ends:
            seen = value.diff(prepend=value.new_zeros(1))
        else:
            index = value.flatten() % self.count
            index = index.repeat_interleave(len(rows) // max(len(index), 1))
            seen, rows = index.bincount(minlength=self.count), rows[index.argsort(stable=True)]
        parts = rows[: int(seen.sum())].split(seen.tolist())
        return pad_sequence(parts, batch_first=True), seen


@dataclass(frozen=True, slots=True)
class Origin:
    """The stored array `weight` behind an operand: which of its dimensions each one is.

    `views` are the tensors between them.
    """

    weight: str
    dims: Dims
    views: tuple[str, ...] = ()
    route: Route | None = None


def _view(dims: Callable[[Node, Dims], Iterable[int]]) -> Callable[..., Origin]:
    """A view that keeps every dimension, by a function of the dimensions that it is given."""
    return lambda graph, node, behind: replace(behind, dims=tuple(dims(node, behind.dims)))


def _lookup(graph: Graph, node: Node, behind: Origin) -> Origin | None:
    """index(array, [which]) along the first dimension, where data says which."""
    if not graph.tensors[node.outputs[0]].looked or len(node.args[1]) != 1:
        return None
    at, dims = node.args[1][0].name, behind.dims
    count = graph.tensors[node.args[0].name].shape[0]
    return replace(behind, dims=dims[:1] * len(graph.tensors[at].shape) + dims[1:],
                   route=Route(node.name, at, dims[0], count))


ORIGINS: dict[str, Callable[[Graph, Node, Origin], Origin | None]] = {
    **dict.fromkeys("aten.to aten._to_copy aten.clone aten.contiguous".split(),
                    _view(lambda n, d: d)),
    **dict.fromkeys("aten.permute aten.transpose aten.swapaxes".split(), _view(moved)),
    **dict.fromkeys("aten.t aten.numpy_T".split(), _view(lambda n, d: d[::-1])),
    "aten.index": _lookup,
}


def origin(graph: Graph, name: str) -> Origin | None:
    """Return the stored array that an operand is a view of, or looked up in; None if it is none."""
    tensor = graph.tensors[name]
    if tensor.weight is not None:
        return Origin(name, tuple(range(len(tensor.shape))))
    node = graph.maker(name)
    row = ORIGINS.get(node.op.rsplit(".", 1)[0]) if node is not None else None
    if node is None or row is None:
        return None
    behind = origin(graph, node.args[0].name)
    found = row(graph, node, behind) if behind is not None else None
    return None if found is None else replace(found, views=(*found.views, name))
