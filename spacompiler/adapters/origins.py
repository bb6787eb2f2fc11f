"""The table of origins: what the arrays of each are called, and the formula of what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from . import formulas
from .combining import Pair
from .formulas import Layer
from .kinds import NOT_WEIGHTS, PER_INPUT

A = ("lora_A.weight", "lora_A", "lora_down.weight", "lora.down.weight", "lora.lora_A",
     "lora_linear_layer.down.weight", "down.weight", "parametrizations.weight.0.lora_A")
B = ("lora_B.weight", "lora_B", "lora_up.weight", "lora.up.weight", "lora.lora_B",
     "lora_linear_layer.up.weight", "up.weight", "parametrizations.weight.0.lora_B")
BARE = ("lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight",
        "hada_w1_a", "lokr_w1", "lokr_w2")
"""Spellings of writers that mean alpha = rank where they store none."""
SAYS = ("lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern", "lora_r")
"""Keys of a configuration that all formulas follow."""
SAYS_NOTHING = ("peft_type", "peft_version", "base_model_name_or_path", "task_type",
                "inference_mode", "target_modules", "lora_dropout", "init_lora_weights",
                "fan_in_fan_out", "revision", "auto_mapping", "layers_to_transform",
                "layers_pattern", "exclude_modules", "runtime_config", "delta_type",
                "modified_modules", "backbone_class", "backbone_checkpoint_name", "backbone_hash",
                "opendelta_version", "transformers_version", "common_structure", "torch_dtype")
"""Keys that do not change what an adapter adds."""


@dataclass(frozen=True)
class Origin:
    """One origin: the endings of its arrays' names by what they are, and the formula.

    `may` are arrays that may be absent, `lists` those stored as numbered lists, `says` keys of
    the configuration that the formula follows, `types` what it may name as peft_type beside LORA.
    """

    name: str
    formula: Callable[[Layer], Pair]
    arrays: Mapping[str, tuple[str, ...]]
    may: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def fits(self, have: Iterable[str]) -> bool:
        """True for a layer with exactly these arrays (endings; `*` stands for a number)."""
        left = set(have)
        for names in (*self.arrays.values(), *self.lists.values()):
            if not left & set(names):
                return False
            left -= set(names)
        return not left - {n for names in self.may.values() for n in names}


PAIR = {"A": A, "B": B}
ALPHA, BIAS = {"alpha": ("alpha",)}, {"bias": ("diff_b",)}
POINTS = {"P": ("learnable.In_Qs", "In_Qs"), "Q": ("learnable.Out_Qs", "Out_Qs"),
          "c": ("learnable.shared_coeff_fc", "shared_coeff_fc")}
ORIGINS: Sequence[Origin] = (
    Origin("LoRA (kohya, diffusers, LyCORIS, loralib, OpenDelta), DyLoRA", formulas.lora, PAIR,
           {**ALPHA, **BIAS, "magnitude": ("dora_scale", "lora_magnitude_vector")},
           types=("DYLORA",)),
    Origin("LyCORIS LoCon (Tucker)", formulas.tucker, {**PAIR, "mid": ("lora_mid.weight",)},
           ALPHA),
    Origin("LyCORIS LoHa", formulas.hadamard,
           {n: (f"hada_{n}",) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}, ALPHA),
    *(Origin("LyCORIS LoKr", formulas.kronecker, {n: (f"lokr_{n}",) for n in sides}, ALPHA)
      for sides in (("w1", "w2"), ("w1", "w2_a", "w2_b"), ("w1_a", "w1_b", "w2"),
                    ("w1_a", "w1_b", "w2_a", "w2_b"))),
    Origin("LyCORIS full", formulas.difference, {"diff": ("diff",)}, BIAS),
    Origin("LoRA-XS, LoRA-SB", formulas.between,
           {**PAIR, "M": ("default_lora_latent_mapping.weight", "lora_latent_mapping.weight")},
           types=("LORAXS", "LORASB")),
    Origin("NLoRA", formulas.between, {**PAIR, "M": ("lora_N.weight",)}, says=("use_nlora",),
           types=("NLORA",)),
    Origin("SoRA", formulas.gated, {**PAIR, "gate": ("lora.gate", "gate", "lora_gate")},
           says=("lora_gate",),
           types=("SORA",)),
    Origin("NOLA", formulas.random_bases, {"alpha": ("nola_alpha", "nola_fc.nola_alpha"),
                                           "beta": ("nola_beta", "nola_fc.nola_beta")},
           {"drawn": ("nola_A", "nola_fc.nola_A")}, says=("seed", "ka", "kb"),
           types=("NOLA",)),
    Origin("LoLDU", formulas.triangles,
           {"U": A, "L": B, "z": ("vector_z", "parametrizations.weight.0.vector_z")},
           {"P": ("P", "parametrizations.weight.0.P"),
            "s": ("scaling_factor", "parametrizations.weight.0.scaling_factor")},
           types=("LOLDU",)),
    Origin("TriAdaptLoRA", formulas.triangular, {},
           lists={"A": ("lora_A.*",), "B": ("lora_B.*",), "rows": ("lora_C_row.*",),
                  "columns": ("lora_C_col.*",)}, says=("init_rank", "reference_rank"),
           types=("TRIADAPTLORA",)),
    Origin("SLTrain", formulas.sparse_plus_low_rank,
           {**PAIR, "values": ("sparse_value",), "places": ("sparse_index",)},
           {"scaling": ("scaling",)}, says=("sp_ratio", "trainable_scaling"),
           types=("SLTRAIN",)),
    Origin("MoS", formulas.shards,
           {**PAIR, "A scale": ("lora_A_vec",), "B scale": ("lora_B_vec",)},
           says=("enable_lora_vec", "enable_lora_rotation", "reduce_lora_A_x",
                 "reduce_lora_B_x"),
           types=("MOS",)),
    Origin("SALT", formulas.shifted_values,
           {"scale": ("trainable_scale_A",), "shift": ("trainable_shift_B",), "U": ("U",),
            "S": ("S",), "V": ("Vt",)}, {"X": ("trainable_X",), "Y": ("trainable_Y",)},
           types=("SALT",)),
    Origin("SVFit", formulas.singular_values, {"s": ("svfit_S", "sigma")},
           {"U": ("svfit_U",), "V": ("svfit_V",)},
           types=("SVFIT",)),
    Origin("SNELL (no threshold)", formulas.kernel,
           {"P": ("learnable.In_Qs_1", "In_Qs_1"), "Q": ("learnable.Out_Qs_1", "Out_Qs_1"),
            "c": ("learnable.shared_coeff_fc", "shared_coeff_fc")},
           says=("norm_p", "low_rank_dim", "tuning_model"),
           types=("SNELL",)),
    Origin("SNELL", formulas.thresholded_kernel, POINTS,
           says=("norm_p", "init_thres", "low_rank_dim", "tuning_model"), types=("SNELL",)),
    Origin("SNELLA", formulas.mixed_kernel,
           {**POINTS, **{n: (f"learnable.{n}", n) for n in ("alpha", "beta", "gamma")}},
           says=("init_thres", "low_rank_dim", "tuning_model"), types=("SNELLA",)),
)

REFUSED: Sequence[tuple[str, str, str]] = (
    ("SMORA", r"lora_router|lora_route|smora", f"SMoRA chooses ranks for each token: {PER_INPUT}"),
    ("CMLORA", r"^cmlora|lora_schedule|dominant_lora",
     f"a schedule of several LoRAs over denoising steps: {PER_INPUT}; merge each, or their sum"),
    ("PROMPT_TUNING_LORA", r"prompt_embeddings",
     f"DePT's prompt and what it adds at each position: {NOT_WEIGHTS}"),
    ("ATP_LLAVA", r"(^|\.)atp_|token_prun|prune_threshold",
     "it prunes tokens, so that results depend on how many stay, not on weights"))
"""(peft_type, what its arrays' names hold, why it cannot be merged)."""
