"""Which whole blocks are to go, as a text says."""

from __future__ import annotations

import re

from ..errors import UsageError


def parse_blocks(text: str) -> int | tuple[str, ...] | None:
    """Return how many blocks go, or which; None for `auto`. Raises UsageError for nonsense.

    >>> parse_blocks("4"), parse_blocks("auto"), parse_blocks("h.3, h.4")
    (4, None, ('h.3', 'h.4'))
    """
    if text == "auto":
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        if int(text) < 1:
            raise UsageError(f"cannot drop {text} blocks", fix="give a number from 1, or auto")
        return int(text)
    paths = tuple(part.strip() for part in text.split(","))
    if not all(paths) or len(set(paths)) < len(paths):
        raise UsageError(f"cannot read blocks {text!r}",
                         fix="give a number, auto, or paths with commas between")
    return paths


def check_blocks(blocks: str) -> None:
    """Raise UsageError unless a text is empty or can be read."""
    if blocks:
        parse_blocks(blocks)
