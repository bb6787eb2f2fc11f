"""Complex numbers as pairs of real ones, in the memory where those lie."""

from __future__ import annotations

from collections.abc import Iterator

from ..graph.ir import Node
from .solver import Solver

_CUTS = frozenset(("slice", "narrow", "split", "split_with_sizes", "chunk"))
_VIEWS = _CUTS | frozenset(
    "view reshape unflatten flatten select transpose permute unsqueeze squeeze expand to detach"
    .split())
"""Operators whose result may lie in the memory of what they read; cuts leave gaps in it."""


def view_as_real(s: Solver, n: Node) -> None:
    """view_as_real(x): real and imaginary part in a last dimension."""
    parts = s.space.atom(2, "real and imaginary part")
    s.put(n.outputs[0], [*s.dims[next(n.refs())], parts])


def view_as_complex(s: Solver, n: Node) -> None:
    """view_as_complex(x): the last dimension holds real and imaginary part.

    It works in place: where x is a cut of wider rows, these must hold whole pairs too.
    """
    *rest, parts = s.dims[next(n.refs())]
    s.space.freeze(parts, "real and imaginary part")
    s.put(n.outputs[0], rest)
    s.multiples.extend((s.dims[name][-1], 2) for name in _cut_along_rows(s, next(n.refs())))


def _cut_along_rows(s: Solver, name: str) -> Iterator[str]:
    """The tensors of which a tensor may be a view that leaves out a part of their last dimension.
    """
    while (maker := s.graph.maker(name)) is not None and _word(maker) in _VIEWS:
        whole = next(maker.refs())
        if _word(maker) in _CUTS and s.shape(whole)[-1] != s.shape(name)[-1]:
            yield whole
        name = whole


def _word(node: Node) -> str:
    return node.op.removeprefix("aten.").split(".")[0]
