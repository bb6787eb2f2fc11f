"""What a solver notes while it reads a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..axes.expressions import Expr

Path = tuple[Any, ...]


class Read(NamedTuple):
    """A place where an axis is consumed: `how` is contract, sum, norm, recurrent, score or chosen.

    A score that is removed reads minus infinity, not zero; what is `chosen` is read at positions
    that data gives (see `chosen`), never at removed ones.
    """

    node: str
    tensor: str
    dim: int
    how: str


class Edit(NamedTuple):
    """An argument to re-write when `when` shrinks: to the kept size of `expr` (`plus` a number),
    or to `value`."""

    node: str
    path: Path
    expr: Expr
    when: Expr
    value: float | None = None
    plus: int = 0


class Label(NamedTuple):
    """What the integers of a tensor say of an axis: `kind` is position (each is one of it), count
    (how often each position was chosen) or end (counts added up along the axis)."""

    axis: Expr
    kind: str


class Contraction(NamedTuple):
    """Which letters each operand of a contraction carries (for the test of fibres)."""

    node: str
    letters: dict[str, Expr]
    operands: tuple[frozenset[str], ...]
    macs: tuple[Expr, ...]
    factor: int = 1


@dataclass(frozen=True, slots=True)
class Gather:
    """A node that takes positions `index` of dimension `dim` of `source`.

    Where that dimension shrinks, the node becomes an index_select by the kept positions.
    """

    node: str
    source: str
    result: str
    dim: int
    index: np.ndarray
