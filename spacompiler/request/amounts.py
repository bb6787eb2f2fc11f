"""Amounts that options say in words of their own: sizes of files."""

from __future__ import annotations

import re

from ..errors import UsageError


def parse_size(text: str) -> int:
    """Return bytes of a size that is written with its unit; raises UsageError for another text.

    >>> parse_size("500MB"), parse_size("1.5 GB")
    (500000000, 1500000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT])B\s*", str(text))
    size = 0 if found is None else float(found[1]) * 1000 ** (1 + "kMGT".index(
        found[2].replace("K", "k")))
    if size < 1:
        raise UsageError(f"cannot read size {text!r}", fix="give a number and a unit, as 500MB")
    return int(size)
