"""What a recipe says of layers that become products of two smaller ones.

>>> parse_low_rank("*mlp*=60%")
('*mlp*', 0.6)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def check_low_rank_beside(values: Mapping[str, object]) -> None:
    """Raise UsageError for an option beside products of layers that has no place for them.

    `values` are those of a recipe, by the names of its fields.
    """
    runtime, layout = values["runtime"], values["layout"]
    asks = f"; --for {runtime} asks for it" if runtime else ""
    leave = "leave low_rank out" + (", or compile without --for" if runtime else "")
    if layout not in ("auto", "any"):
        raise UsageError(f"the {layout} layout cannot say products of two layers",
                         why=f"no configuration of transformers has them{asks}",
                         fix=leave if runtime else f"{leave}, or use --layout any")
    if values["gguf"]:
        raise UsageError("a GGUF file cannot hold products of two layers",
                         why=f"no graph of llama.cpp has them{asks}",
                         fix=leave if runtime else f"{leave}, or leave gguf out")
    for name in ("modules", "keep_adapter"):
        if values[name]:
            raise UsageError(f"layers cannot become products with {name}", fix=f"leave {name} out")


def check_low_rank(texts: Sequence[str]) -> None:
    """Raise UsageError unless all can be read."""
    for text in texts:
        parse_low_rank(text)
