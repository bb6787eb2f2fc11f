"""Sums of powers of stored weights onto groups: an array is read once for all groups that it is in.

Rows of a matrix are slices of one group, its columns of another. Which sums will be asked for is
known before the first is, so that all of them are taken while a part of the array is at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from ..axes.expressions import Expr
from ..groups.solution import Group, Member
from .slots import deciding, onto_group, sums_of

Axes = tuple[int, ...]


@dataclass
class Powers:
    """Sums of |w|^p by array and dimensions; `stored` gives arrays by name, `dims` their axes.

    What was taken is kept until it was asked for as often as expected.
    """

    stored: Callable[[str], torch.Tensor]
    dims: Callable[[str], tuple[Expr, ...]]
    _expected: dict[str, Counter[Axes]] = field(default_factory=dict)
    _held: dict[tuple[str, int], dict[Axes, torch.Tensor]] = field(default_factory=dict)

    def expect(self, groups: Iterable[Group]) -> None:
        """Say which groups will be asked for: of their members with several dimensions."""
        for group in groups:
            for member in group.members:
                dims = self.dims(member.weight)
                if len(dims) > 1:
                    self._expected.setdefault(member.weight, Counter())[
                        deciding(dims, member.dim, group)] += 1

    def of(self, member: Member, group: Group, p: int) -> tuple[torch.Tensor, float]:
        """Return sum |w|^p of a member onto the group (`group.shape`) and weights in a slice."""
        dims = self.dims(member.weight)
        axes = deciding(dims, member.dim, group)
        waited = self._expected.setdefault(member.weight, Counter())
        held = self._held.setdefault((member.weight, p), {})
        if axes not in held:
            several = sorted({axes, *waited})
            held.update(zip(several, sums_of(self.stored(member.weight), several, p), strict=True))
        sums = held[axes]
        waited[axes] -= 1
        if waited[axes] <= 0:
            del waited[axes], held[axes]
        return onto_group(sums, dims, member.dim, group)
