"""What llama.cpp calls the language models that it runs: one row for each type of transformers'.

A row says which architecture's graph computes the same, what a configuration must say for that,
and which further entries that graph reads. Names of tensors are the gguf package's. Widths and
heads are read off the arrays: where layers differ, `unequal` is an architecture whose graph is the
same and sizes every layer by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PLAIN: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",), "sliding_window": (None,), "layer_types": ("full_attention",),
    "no_rope_layers": (1,)}
"""What the plain decoder's graph takes for granted, by entry: values (of all items of a list)."""
GELU = {**PLAIN, "hidden_act": ("gelu_pytorch_tanh", "gelu_new"),
        "hidden_activation": ("gelu_pytorch_tanh", None)}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_epsilon"}


@dataclass(frozen=True, slots=True)
class Arch:
    """A row: the architecture where all layers are equal, and what it reads.

    `pairs` says that the two halves of a rotary pair stand side by side in rows of queries and
    keys (transformers puts them half a head apart). `shifted` norms are stored as what is added to
    one. `fused` joins arrays of a layer, by the new one's name. `expects` holds entries of the
    configuration with the values that the graph computes, `reads` keys with the entries that they
    are taken from. `tied` says that the graph has no output layer of its own, `square` that its
    heads times their size are the hidden size, `scaled` that it multiplies embeddings with its
    root.
    """

    name: str
    pairs: bool = False
    shifted: bool = False
    tied: bool = False
    square: bool = False
    scaled: bool = False
    rotary: bool = True
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expects: Mapping[str, tuple[object, ...]] = field(default_factory=lambda: PLAIN)
    reads: Mapping[str, str] = field(default_factory=lambda: RMS)
    unequal: Arch | None = None


_DECI = Arch("deci", pairs=True)
_OPENELM = Arch("openelm", tied=True, fused={"attn_qkv": ("attn_q", "attn_k", "attn_v")})
_SWITCHED = {**PLAIN, "use_sliding_window": (False, None)}

ROWS: Mapping[str, Arch] = {
    "llama": Arch("llama", pairs=True, unequal=_DECI),
    "mistral": Arch("llama", pairs=True, unequal=_DECI),
    "qwen2": Arch("qwen2", expects=_SWITCHED, unequal=Arch("deci", pairs=True, expects=_SWITCHED)),
    "qwen3": Arch("qwen3", expects=_SWITCHED, unequal=_OPENELM),
    "gemma": Arch("gemma", shifted=True, tied=True, scaled=True, expects=GELU),
    "olmo2": Arch("olmo2"),
    "granite": Arch("granite", pairs=True, reads={
        **RMS, "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}),
    "gpt2": Arch("gpt2", square=True, rotary=False, reads=LAYER_NORM, expects={
        "activation_function": ("gelu_new",), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,)}),
}
"""Rows by `model_type`."""
