"""Wishes for single layers: what groups that match a pattern keep.

>>> parse_wish("*mlp*=50%"), parse_wish("*attn*>=0.3"), parse_wish("*=x8")
(Wish(pattern='*mlp*', kind='share', value=0.5), Wish(pattern='*attn*', kind='least', value=0.3), Wish(pattern='*', kind='multiple', value=8.0))
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UsageError

FORM = "write PATTERN=50% (so much stays), PATTERN>=30% (at least) or PATTERN=x8 (multiples of 8)"


@dataclass(frozen=True)
class Wish:
    """A pattern over groups and parameters, and what those keep: a share, a least share, or
    multiples of a number."""

    pattern: str
    kind: str
    value: float

    def of(self, legal: Sequence[int], size: int) -> tuple[int, ...]:
        """Return which of the counts (ascending), of `size` slices, the wish allows."""
        if self.kind == "least":
            return tuple(k for k in legal if k >= self.value * size or k == size)
        if self.kind == "multiple":
            return tuple(k for k in legal if k % self.value == 0 or k == size)
        return (min(legal, key=lambda k: (abs(k - self.value * size), k)),)


def parse_wish(text: str) -> Wish:
    """Read a wish; raises UsageError for what is none."""
    read = re.fullmatch(r"(.+?)=?(>=|=x|=)\s*(\d+\.?\d*)\s*(%?)", text)
    if not read:
        raise UsageError(f"cannot read wish {text!r}", fix=FORM)
    pattern, sign, number, percent = read.groups()
    value = float(number) / (100 if percent else 1)
    kind = {">=": "least", "=x": "multiple", "=": "share"}[sign]
    fits = value >= 1 and value == int(value) and not percent if kind == "multiple" \
        else 0 < value <= 1
    if not fits:
        raise UsageError(f"wish {text!r} is out of range", fix=FORM)
    return Wish(pattern, kind, value)


def check_wishes(texts: Iterable[str]) -> None:
    """Raise UsageError unless each text is a wish."""
    for text in texts:
        parse_wish(text)
