"""Adapters of other origins than peft: one table of what their arrays are called and mean.

Each becomes LoRA as peft stores it, so that merging, combining, slicing and the probe are the
same for all. What a layer's arrays are together (`Origin.arrays`) says where they come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SpaError
from . import formulas
from .combining import Pair, lora_config
from .files import ORIGIN, PREFIX, Adapter, check_keys, check_type, read_json, stored
from .formulas import Layer
from .kinds import KINDS, NOT_WEIGHTS, PER_INPUT
from .naming import component, matched, spellings

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

ENDINGS = sorted({name for o in ORIGINS for group in (o.arrays, o.may, o.lists)
                  for names in group.values() for name in names}, key=len, reverse=True)
OF_PEFT = {"lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "lora_magnitude_vector"}
OLD_BONE = {"bone_block": "miss_block"}
Groups = dict[str, dict[str, list[torch.Tensor]]]


def is_foreign(kind: str, keys: Iterable[str], options: Mapping[str, object]) -> bool:
    """True for arrays that are not what peft stores for its type, or that options apply to."""
    return bool(options) or kind not in KINDS or (kind == "LORA" and any(
        ending not in OF_PEFT for key in keys if (ending := _split(key)[1])))


def check_refused(kind: str, keys: Iterable[str], where: str) -> None:
    """Raise SpaError with the reason for an origin that no weight can express."""
    if kind in KINDS and kind != "LORA":
        return
    for name, pattern, why in REFUSED:
        if kind.upper().replace("-", "_") == name or any(re.search(pattern, k) for k in keys):
            raise SpaError("this adapter cannot be merged", where=where, why=why,
                           fix="prune the base without it")


def renewed(config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
            ) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Directories of a type that peft has renamed, as it names them today (Bone: MiSS)."""
    if config.get("peft_type") != "BONE":
        return dict(config), dict(tensors)
    made = {re.sub("|".join(OLD_BONE), lambda m: OLD_BONE[m[0]], k): v for k, v in tensors.items()}
    return {**config, "peft_type": "MISS"}, made


def resolved(adapter: Adapter, module: nn.Module) -> tuple[Adapter, list[str]]:
    """Return the adapter as peft's LoRA for the layers of a module, and notes.

    Raises SpaError: arrays of no known origin, layers or sizes of another network, or a
    configuration that says what the formula does not follow.
    """
    if not adapter.foreign:
        return adapter, []
    where = str(adapter.path)
    groups, whole = _groups(adapter.tensors, module, where)
    paths, others = matched(groups, (p for p, m in module.named_modules() if _holds(m)), where)
    made, names, biases = dict[str, Pair](), set(), dict[str, torch.Tensor]()
    for name, path in paths.items():
        origin = _origin(name, groups[name], where)
        names.add(origin.name)
        layer = _layer(adapter, origin, name, path, groups[name], module)
        _check_says(adapter.type, layer.config, origin, where)
        made[path] = _formula(origin, layer)
        if "bias" in layer:
            biases[path] = layer.arrays["bias"]
    notes = [f"{where}: read as {', '.join(sorted(names))}"]
    notes += [f"{where}: its arrays for {other} belong to another network and were left out"
              for other in others]
    if whole:
        notes.append(f"{where}: {len(whole)} layers of the base are replaced whole")
    lora = _with_biases(_as_lora(adapter, made, whole, module), made, biases)
    return lora, notes


def _holds(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim > 1


def _split(key: str) -> tuple[str, str]:
    """(layer, ending) of an array's name; the ending is "" if none is known."""
    plain = re.sub(r"\.\d+$", ".*", key)
    for ending in ENDINGS:
        name = plain if ending.endswith("*") else key
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
    return key, ""


def _groups(tensors: Mapping[str, torch.Tensor], module: nn.Module, where: str
            ) -> tuple[Groups, dict[str, dict[str, torch.Tensor]]]:
    """The arrays by layer and ending, and whole arrays that the base has too, by layer."""
    found: Groups = {}
    whole: dict[str, dict[str, torch.Tensor]] = {}
    base = module.state_dict()
    for key in sorted(tensors, key=_natural):
        layer, ending = _split(key.replace(".default.", ".").removesuffix(".default"))
        name = next((n for n in spellings(key) if n in base), "")
        if ending:
            found.setdefault(layer, {}).setdefault(ending, []).append(tensors[key])
        elif name and base[name].shape == tensors[key].shape:
            path, _, leaf = name.rpartition(".")
            whole.setdefault(path, {})[leaf] = tensors[key]
        else:
            raise SpaError("the adapter holds an array that is not understood", where=where,
                           why=f"{key} belongs to no origin that is known"
                               + (f", and the base's {name} has another shape" if name else ""),
                           fix="merge it with the library that wrote it, save the model, and "
                               "prune that")
    return found, whole


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _origin(name: str, have: Iterable[str], where: str) -> Origin:
    found = next((o for o in ORIGINS if o.fits(have)), None)
    if found is None:
        raise SpaError("the adapter is not whole, or of no origin that is known", where=where,
                       why=f"{name} has {', '.join(sorted(have))}",
                       fix="copy the whole file or directory that was saved")
    return found


def _check_says(kind: str, config: Mapping[str, object], origin: Origin, where: str) -> None:
    from .merging import defaults

    named = re.sub("[-_]", "", str(config.get("peft_type", "LORA"))).upper()
    if named not in ("LORA", *origin.types):
        raise SpaError(f"adapters of type {config['peft_type']!r} are not known", where=where,
                       why=f"adapter_config.json names it as peft_type, over arrays of "
                           f"{origin.name}",
                       fix="merge it with the library that wrote it, save the model, and prune "
                           "that")
    usual = defaults(kind)
    check_keys(where, {k: v for k, v in config.items() if v != usual.get(k, ...)},
               {*SAYS, *SAYS_NOTHING, *origin.says})


def _said(config: Mapping[str, object], part: str) -> dict[str, object]:
    """What a configuration says of a component, and of all."""
    mine = {k.removeprefix(f"{part}."): v for k, v in config.items()
            if part and k.startswith(f"{part}.")}
    found = {**{k: v for k, v in config.items() if "." not in k}, **mine}
    if "lora_r" in found:
        found.setdefault("r", found["lora_r"])
    return found


def _layer(adapter: Adapter, origin: Origin, name: str, path: str,
           group: Mapping[str, list[torch.Tensor]], module: nn.Module) -> Layer:
    weight = module.get_submodule(path).get_parameter("weight").detach()
    if type(module.get_submodule(path)).__name__ == "Conv1D":
        weight = weight.T
    arrays = {what: group[n][0] for part in (origin.arrays, origin.may)
              for what, names in part.items() for n in names if n in group}
    lists = {what: group[n] for what, names in origin.lists.items() for n in names if n in group}
    said = component(name)
    unit = bool(said) or any(n in group for n in BARE)
    return Layer(path, arrays, lists, weight, _said(adapter.config, said), adapter.options, unit)


def _formula(origin: Origin, layer: Layer) -> Pair:
    try:
        a, b = origin.formula(layer)
        fits = (b.shape[0], a.shape[1]) == layer.matrix.shape
        why = f"it adds {b.shape[0]} × {a.shape[1]} to {tuple(layer.weight.shape)}"
    except (RuntimeError, IndexError, ValueError) as problem:  # of torch, where shapes differ
        fits, why = False, str(problem).splitlines()[0]
    if not fits:
        raise SpaError("the adapter does not fit this model", where=layer.path,
                       why=f"{why} ({origin.name})", fix="give the base that it was trained on")
    return a.float().contiguous(), b.float().contiguous()


def _as_lora(adapter: Adapter, made: Mapping[str, Pair],
             whole: Mapping[str, Mapping[str, torch.Tensor]], module: nn.Module) -> Adapter:
    """LoRA of peft, each layer with its own rank, alpha = rank; whole layers beside it."""
    tensors, ranks = {}, {path: len(a) for path, (a, _) in made.items()}
    for path, (a, b) in made.items():
        weight = module.get_submodule(path).get_parameter("weight")
        inner, outer = weight.shape[1:], (1,) * (weight.ndim - 2)
        wide = weight.ndim > 2
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.reshape(len(a), *inner) if wide else a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.reshape(*b.shape, *outer)
    for path, arrays in whole.items():
        part = module.get_submodule(path)
        if path in made or any(True for _ in part.children()):
            raise SpaError("the adapter holds an array that is not understood", where=path,
                           why="it brings the layer's own weights beside what it adds to them",
                           fix="merge it with the library that wrote it, save the model, and "
                               "prune that")
        for leaf, own in part.state_dict().items():
            tensors[f"{PREFIX}{path}.{leaf}"] = arrays.get(leaf, own).to(own.dtype)
    top = max(ranks.values())
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != top}
    config = {**lora_config(adapter.config, top, list(made)), "rank_pattern": patterns,
              "alpha_pattern": dict(patterns), "modules_to_save": sorted(whole) or None}
    return replace(adapter, config=config, tensors=tensors, foreign=False, options={})


def _with_biases(lora: Adapter, made: Mapping[str, Pair], biases: Mapping[str, torch.Tensor]
                 ) -> Adapter:
    """The same, adding to the layers' biases too (zeros where a layer's is not changed)."""
    if not biases:
        return lora
    more = {f"{PREFIX}{path}.lora_B.bias": biases.get(path, torch.zeros(len(b))).float()
            for path, (_, b) in made.items()}
    return replace(lora, config={**lora.config, "lora_bias": True},
                   tensors={**lora.tensors, **more})


def read(path: Path, weight: float = 1.0, options: Mapping[str, Any] | None = None) -> Adapter:
    """Read and check an adapter: a directory of peft's, or a file or directory of another origin.

    Raises SpaError: no adapter there, damaged weights, or a type that can't be merged.
    """
    given = dict(options or {})
    config, tensors = stored(path)
    kind = str(config.get("peft_type", ""))
    check_refused(kind, tensors, str(path))
    config, tensors = renewed(config, tensors)
    kind = str(config.get("peft_type", ""))
    strange = is_foreign(kind, tensors, given)
    if not strange or kind in KINDS:
        check_type(str(path), config)
    origin = read_json(path / ORIGIN) if (path / ORIGIN).exists() else {}
    return Adapter(path, weight, config, tensors, origin, strange, given)
