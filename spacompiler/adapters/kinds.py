"""What is known of each adapter type of peft: whether it merges, how it slices, what to refuse.

`axes` says, per stored array of an adapted module, which axis of that module each of its
dimensions follows: `out` and `in` are the module's features, `-` is the adapter's own (a rank).
Dimensions of size 1 broadcast and follow nothing. A type with `axes` is sliced as it stands
(a slice of the merged weight is the merge of the slices); `as_lora` types have a low-rank
difference W' - W, which is written as LoRA and sliced; the others mix all rows or columns of a
weight, so that they must be merged first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NOT_WEIGHTS = "it changes what the model reads, not its weights"
PER_INPUT = "what it adds depends on the input, so no fixed weight equals it"


@dataclass(frozen=True, slots=True)
class Kind:
    """One adapter type.

    `refused` says why it cannot be merged ("" if it can). `fill` is what a lifted array holds
    where the pruned model had nothing. What `adds` changes a weight linearly in its arrays, from
    `fill` on. `biases` are endings of array names that need a bias in
    the module that they belong to.
    """

    refused: str = ""
    axes: Mapping[str, str] = field(default_factory=dict)
    as_lora: bool = False
    fill: float = 0.0
    adds: bool = False
    biases: tuple[str, ...] = ()


_LORA = {"lora_A.weight": "- in", "lora_B.weight": "out -", "lora_B.bias": "out",
         "lora_embedding_A": "- in", "lora_embedding_B": "out -",
         "lora_magnitude_vector": "out"}
MERGED, LOW_RANK = Kind(), Kind(as_lora=True)

KINDS: Mapping[str, Kind] = {
    "LORA": Kind(axes=_LORA, biases=(".lora_B.bias",)),
    "ADALORA": Kind(axes={"lora_A": "- in", "lora_B": "out -", "lora_E": "- -", "ranknum": "-"}),
    "HIRA": Kind(axes={"hira_A": "- in", "hira_B": "out -",
                       "hira_embedding_A": "- in", "hira_embedding_B": "out -"}),
    "LOHA": Kind(axes={"hada_w1_a": "out -", "hada_w1_b": "- in",
                       "hada_w2_a": "out -", "hada_w2_b": "- in"}),
    "IA3": Kind(axes={"ia3_l": "out in"}, fill=1.0, adds=True),
    "LN_TUNING": Kind(axes={"ln_tuning_layers.weight": "out", "ln_tuning_layers.bias": "out"}),
    "BEFT": Kind(axes={"beft_bias": "- out"}, adds=True, biases=(".beft_bias",)),
    **dict.fromkeys(("DELORA", "MISS", "VERA", "VBLORA", "UNILORA", "TINYLORA"), LOW_RANK),
    **dict.fromkeys(("ADAMSS", "BOFT", "C3A", "DEFT", "FOURIERFT", "FROD", "GLORA", "GRALORA",
                     "HRA", "LOKR", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD",
                     "SHIRA", "SUPERTUNING", "TRAINABLE_TOKENS", "WAVEFT"), MERGED),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), Kind(PER_INPUT)),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING",
                     "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"), Kind(NOT_WEIGHTS)),
}


@dataclass(frozen=True, slots=True)
class Trap:
    """A configuration of a mergeable type that must not be merged: `when(config)` finds it."""

    kinds: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], Any]
    why: str
    fix: str


def _init(config: Mapping[str, Any]) -> str:
    return str(config.get("init_lora_weights", ""))


TRAPS: tuple[Trap, ...] = (
    Trap(("LORA",), lambda c: c.get("alora_invocation_tokens"), PER_INPUT,
         "run an activated LoRA beside the unpruned model"),
    Trap(("LORA",), lambda c: c.get("arrow_config"), PER_INPUT,
         "merge the task adapters that it routes between"),
    Trap(("LORA",), lambda c: c.get("layer_replication"),
         "it repeats layers of the base, which is then another network",
         "merge it with peft, save the model, and prune that"),
    Trap(("LORA",), lambda c: _init(c).startswith("pissa_niter") or _init(c) == "lora_ga",
         "its initialisation changed the base weights in a way that the adapter's files do not "
         "reproduce: the merge would be wrong",
         "save it again with path_initial_model_for_weight_conversion, or give the base that it "
         "was trained on with its changed weights"),
    Trap(("LORA",), lambda c: _init(c) in ("corda", "loftq"),
         "its initialisation needs data that the adapter's files do not hold",
         "save it again with path_initial_model_for_weight_conversion"),
)

# an adapted layer that peft merges wrongly: (adapter type, test, reason)
LAYER_TRAPS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("OFT", lambda base: any(k > 1 for k in getattr(base, "kernel_size", ())),
     "OFT rotates overlapping patches, which no convolution weight can express"),
)

# why several adapters of a configuration can't be combined, or one be weighted
COMBINATION_TRAPS: tuple[tuple[Callable[[Mapping[str, Any]], Any], str], ...] = (
    (lambda c: c.get("use_dora"), "DoRA's magnitudes do not add"),
    (lambda c: c.get("lora_bias"), "its biases would be dropped"),
    (lambda c: _init(c) in ("pissa", "olora", "mica"), "each was trained on a changed base"),
    (lambda c: c.get("kasa_config"), "each was trained on a changed base"),
    (lambda c: c.get("modules_to_save"), "whole modules that it brings do not add"),
    (lambda c: c.get("target_parameters"), "factors of whole parameters are not combined"),
)
