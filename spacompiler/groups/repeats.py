"""What a name says about repeated blocks: lists of modules number their members.

>>> block("model.layers.12.mlp.up_proj.weight:0"), block("head.weight:0")
('model.layers.12', None)
>>> family("model.layers.12.mlp.up_proj.weight:0")
'model.layers.*.mlp.up_proj.weight:0'
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def block(name: str) -> str | None:
    """Return the path of the outermost repeated block that a group's name lies in, if any."""
    found = _BLOCK.match(name)
    return found[1] if found else None


def family(name: str) -> str:
    """Return a group's name with list indices masked: repeated blocks share it."""
    return _NUMBER.sub("*", name)
