"""What a recipe says of layers that become products of two smaller ones.

>>> parse_low_rank("*mlp*=60%")
('*mlp*', 0.6)
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError


def parse_low_rank(text: str) -> tuple[str, float]:
    """Return (pattern of paths, share of their parameters that stays); raises UsageError."""
    pattern, _, share = text.rpartition("=")
    try:
        amount = float(share.rstrip("%")) / (100 if share.endswith("%") else 1)
    except ValueError:
        amount = 0.0
    if not pattern or not 0 < amount < 1:
        raise UsageError(f"cannot read low rank {text!r}",
                         fix="write PATTERN=SHARE, e.g. '*mlp*=60%': what stays of the parameters "
                             "of layers whose path matches")
    return pattern, amount


def check_low_rank(texts: Sequence[str]) -> None:
    """Raise UsageError unless all can be read."""
    for text in texts:
        parse_low_rank(text)
