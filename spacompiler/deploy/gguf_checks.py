"""What llama.cpp's graphs take for granted, held against a model before it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import SpaError
from ..stages.tolerances import FIXED_FACTOR
from .gguf_table import ROWS, Arch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_gguf(model: nn.Module) -> Arch:
    """Return the row of a model; raises SpaError where llama.cpp has none that is its graph."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    head = type(model).__name__
    if kind not in ROWS or not head.endswith(("ForCausalLM", "LMHeadModel")):
        raise SpaError("this model cannot be written as GGUF", where=head,
                       why=f"no graph of llama.cpp is known to be that of {kind or head!r}",
                       fix=f"leave --gguf out; language models of {', '.join(ROWS)} can be written")
    return ROWS[kind]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, read off its arrays: one number a layer for heads and widths."""

    heads: list[int]
    groups: list[int]
    widths: list[int]
    head_dim: int

    @property
    def equal(self) -> bool:
        """Whether one number does for all layers."""
        return all(len(set(one)) < 2 for one in (self.heads, self.groups, self.widths))


def unequal(arch: Arch, model: nn.Module) -> Arch:
    """The architecture that sizes every layer by itself."""
    tied = model.config.get_text_config().tie_word_embeddings  # type: ignore[union-attr, operator]
    if arch.unequal is None or (arch.unequal.tied and not tied):
        raise SpaError(
            "layers of unequal width cannot be written as GGUF", where=type(model).__name__,
            why=f"llama.cpp's {arch.name} sizes all layers alike"
                + ("" if arch.unequal is None else
                   f", and {arch.unequal.name}, which does not, has no output layer of its own"),
            fix="use --layout uniform, or leave --gguf out")
    return arch.unequal


def check_config(arch: Arch, config: PreTrainedConfig) -> None:
    """Raise SpaError where a configuration says what the architecture's graph does not compute."""
    for entry, allowed in arch.expects.items():
        said = getattr(config, entry, allowed[0])
        for value in said if isinstance(said, (list, tuple)) else (said,):
            if value not in allowed:
                raise SpaError("this model cannot be written as GGUF", where=f"{entry}={said!r}",
                               why=f"llama.cpp's {arch.name} computes {entry}={allowed[0]!r} alone",
                               fix="leave --gguf out")


def check_square(arch: Arch, sizes: Sizes, width: int) -> None:
    """Raise SpaError where heads do not fill the hidden size and the graph takes it for granted."""
    if arch.square and {heads * sizes.head_dim for heads in sizes.heads} != {width}:
        raise SpaError("this model cannot be written as GGUF", where="heads",
                       why=f"llama.cpp's {arch.name} has as many columns of queries as the hidden "
                           f"state, {width}", fix="let no heads go: --role channel")


def check_scale(arch: Arch, model: nn.Module, width: int) -> None:
    """Raise SpaError where embeddings are multiplied with another number than the graph does."""
    want = width**0.5 if arch.scaled else 1.0
    for module in model.modules():
        have = float(getattr(module, "embed_scale", want))  # type: ignore[arg-type]
        if abs(have / want - 1) > FIXED_FACTOR.value:
            raise SpaError("this model cannot be written as GGUF", where=f"embed_scale={have:g}",
                           why=f"llama.cpp's {arch.name} multiplies embeddings with {want:g}",
                           fix="let the hidden size stay: fewer --role")
