"""A language model of transformers as one GGUF file, which llama.cpp runs.

Names of tensors and the format are the gguf package's; which architecture's graph a model is comes
from `gguf_table`. Sizes are those of the arrays, so that a pruned model is written as it is: with
lists of widths and heads where layers differ. What is written is read back and compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import ProofError, SpaError, UsageError
from ..request.recipe import BLOCK
from ..stages.tolerances import FIXED_FACTOR
from .gguf_checks import Sizes, check_config, check_gguf, check_scale, check_square, unequal
from .gguf_table import Arch

if TYPE_CHECKING:
    from types import ModuleType

    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER = re.compile(r"^blk\.(\d+)\.(.+)\.(weight|bias)$")
Arrays = dict[str, np.ndarray]


def write_gguf(model: PreTrainedModel, path: Path, kind: str = "f32", *,
               folder: Path | None = None) -> dict[str, Any]:
    """Write a model, with the tokenizer that lies in a folder; return what the report says.

    `kind` is a type of weights (`GGUF_TYPES`); vectors stay float32.

    Raises:
        SpaError: no graph of llama.cpp computes this model, or an array has no name there.
        UsageError: rows that the type cannot hold, or the gguf package is missing.
        ProofError: what lies in the file is not what was to be written.
    """
    from .gguf_tokens import tokens

    gguf = _package()
    arch = check_gguf(model)
    config = model.config.get_text_config()
    arrays = _named(gguf, arch, model)
    sizes = _sizes(arrays, config, _head_dim(model))
    if not sizes.equal:
        arch = unequal(arch, model)
        arrays = _named(gguf, arch, model)
    check_config(arch, config)
    width = arrays["token_embd.weight"].shape[1]
    check_square(arch, sizes, width)
    check_scale(arch, model, width)
    arrays = _as_stored(arch, arrays, sizes, model)
    writer = gguf.GGUFWriter(path, arch.name)
    for key, value in _entries(arch, sizes, arrays, config).items():
        _put(writer, f"{arch.name}.{key}", value)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, _file_type(kind))))
    said = tokens(writer, folder, arrays["token_embd.weight"].shape[0])
    made = {name: _typed(gguf, name, array, kind) for name, array in arrays.items()}
    _write(writer, made)
    _read_back(gguf, path, made)
    return {"architecture": arch.name, "type": kind, "tensors": len(made), "tokenizer": said,
            "equal": sizes.equal, "bytes": path.stat().st_size}


def check_writable(model: PreTrainedModel) -> Arch:
    """Return the row of a dense model, once all is known to have a place in a file.

    Raises SpaError or UsageError as `write_gguf` does.
    """
    gguf, arch = _package(), check_gguf(model)
    places = _places(gguf, arch, model)
    check_config(arch, model.config.get_text_config())
    check_scale(arch, model, places["token_embd.weight"][1].shape[1])
    dim = _head_dim(model)
    _rescale(arch, model, dim)
    _rotary_factors(arch, model, dim)
    return arch


def _write(writer: GGUFWriter, made: Mapping[str, tuple[np.ndarray, Any]]) -> None:
    for name, (data, stored) in made.items():
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError as problem:
        raise UsageError("GGUF files are written by the gguf package, which is not installed",
                         fix="pip install 'spacompiler[gguf]', or leave --gguf out") from problem
    return gguf


def _named(gguf: ModuleType, arch: Arch, model: nn.Module) -> Arrays:
    """Every array of a model under its name in the file; two that are tied are one.

    Raises SpaError for an array that has no name there.
    """
    from transformers.pytorch_utils import Conv1D

    turned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    found: Arrays = {}
    for known, (name, tensor) in _places(gguf, arch, model).items():
        array = tensor.detach().float().numpy()
        found[known] = np.ascontiguousarray(array.T) if name in turned else array
    return found


def _places(gguf: ModuleType, arch: Arch, model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Names in the file, with the name in the model and the array of each."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(kind, model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    parts = {part for joined in arch.fused.values() for part in joined}
    found: dict[str, tuple[str, torch.Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        known = names.get_name(name, (".weight", ".bias")) or _part(name, parts)
        if known is None:
            raise SpaError("an array has no place in a GGUF file", where=name,
                           why=f"llama.cpp's {arch.name} knows no such tensor",
                           fix="leave --gguf out")
        found[known] = name, tensor
    return found


_PARTS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}


def _part(name: str, parts: set[str]) -> str | None:
    """The name of an array that goes into a joined one."""
    for part in parts:
        match = re.fullmatch(rf".*\.(\d+)\.{re.escape(_PARTS[part])}\.(weight|bias)", name)
        if match:
            return f"blk.{match[1]}.{part}.{match[2]}"
    return None


def _sizes(arrays: Arrays, config: PreTrainedConfig, dim: int) -> Sizes:
    """Heads and widths of each layer."""
    count = config.num_hidden_layers

    def rows(layer: int, part: str) -> int:
        array = arrays.get(f"blk.{layer}.{part}.weight")
        return 0 if array is None else array.shape[0]

    fused = any(".attn_qkv." in name for name in arrays)
    outs = [0 if (a := arrays.get(f"blk.{i}.attn_output.weight")) is None else a.shape[1]
            for i in range(count)]
    heads = [n // dim for n in outs]
    groups = [(rows(i, "attn_qkv") // dim - heads[i]) // 2 if fused else rows(i, "attn_k") // dim
              for i in range(count)]
    return Sizes(heads, groups, [rows(i, "ffn_up") for i in range(count)], dim)


def _head_dim(model: nn.Module) -> int:
    """The size of a head, as attention itself has it."""
    found = {d for m in model.modules() if isinstance(d := getattr(m, "head_dim", None), int)}
    if len(found) != 1:
        raise SpaError("this model cannot be written as GGUF", where=type(model).__name__,
                       why=f"its heads have the sizes {sorted(found)}: there is an entry for one",
                       fix="leave --gguf out")
    return found.pop()


def _as_stored(arch: Arch, arrays: Arrays, sizes: Sizes, model: nn.Module) -> Arrays:
    """The arrays in the order and the scale that the graph reads them in."""
    made = dict(arrays)
    rescale = _rescale(arch, model, sizes.head_dim)
    for name, array in arrays.items():
        layer = _LAYER.match(name)
        if arch.shifted and name.endswith("norm.weight"):
            made[name] = array + np.float32(1)
        if layer is None:
            continue
        part, counts = layer[2], {"attn_q": sizes.heads, "attn_k": sizes.groups}
        if arch.pairs and part in counts:
            made[name] = paired(array, counts[part][int(layer[1])])
        if rescale != 1 and part == ("attn_q_norm" if _normed(arrays) else "attn_q"):
            made[name] = made[name] * np.float32(rescale)
    for joined, parts in arch.fused.items():
        for i in range(len(sizes.heads)):
            taken = [made.pop(f"blk.{i}.{part}.weight") for part in parts]
            made[f"blk.{i}.{joined}.weight"] = np.concatenate(taken)
    factors = _rotary_factors(arch, model, sizes.head_dim)
    return made if factors is None else {**made, "rope_freqs.weight": factors}


def paired(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * dim, ...) with the two halves of each rotary pair side by side.

    >>> paired(np.arange(4), 1).tolist()
    [0, 2, 1, 3]
    """
    shape = array.shape
    if not heads:
        return array
    halves = array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(shape))


def _normed(arrays: Arrays) -> bool:
    return any(".attn_q_norm." in name for name in arrays)


def _attentions(model: nn.Module) -> Iterator[Any]:
    return (m for m in model.modules() if isinstance(getattr(m, "scaling", None), float))


def _rescale(arch: Arch, model: nn.Module, dim: int) -> float:
    """What queries are multiplied with, where attention's scale is not that of the head size."""
    if "attention.scale" in arch.reads:
        return 1.0
    scales = {module.scaling for module in _attentions(model)}
    if len(scales) > 1:
        raise SpaError("this model cannot be written as GGUF", where=type(model).__name__,
                       why="its layers scale attention differently", fix="leave --gguf out")
    found = (scales.pop() if scales else dim**-0.5) * dim**0.5
    return 1.0 if abs(found - 1) < FIXED_FACTOR.value else found


def _rotary_factors(arch: Arch, model: nn.Module, dim: int) -> np.ndarray | None:
    """By how much each rotary frequency is lower than the plain one; None where none is.

    Frequencies are those of the model: pairs that were cut, and scalings by frequency, are in them.
    """
    if not arch.rotary:
        return None
    rotary = [m for m in model.modules() if hasattr(m, "inv_freq")]
    parameters: Mapping[str, Any] = model.config.get_text_config().rope_parameters  # type: ignore[union-attr, operator]
    if len(rotary) != 1 or getattr(rotary[0], "attention_scaling", 1.0) != 1.0 \
            or parameters.get("rope_type") == "dynamic":
        raise SpaError("this model cannot be written as GGUF", where="rope_parameters",
                       why="rotary embeddings that differ by layer or length, or are scaled, have "
                           "no entry", fix="leave --gguf out")
    frequencies: torch.Tensor = rotary[0].inv_freq  # type: ignore[assignment]
    have = frequencies.double().numpy()
    plain = float(parameters["rope_theta"]) ** -(np.arange(len(have)) / len(have))
    factors = plain / have
    same = np.allclose(factors, 1, rtol=FIXED_FACTOR.value, atol=0)
    return None if same else factors.astype(np.float32)


def _entries(arch: Arch, sizes: Sizes, arrays: Arrays, config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of the file, by key without the architecture's name."""
    def each(numbers: list[int]) -> int | list[int]:
        return numbers[0] if sizes.equal else numbers

    vocabulary, width = arrays["token_embd.weight"].shape
    found: dict[str, Any] = {
        "block_count": len(sizes.heads), "embedding_length": width, "vocab_size": vocabulary,
        "context_length": config.max_position_embeddings,
        "feed_forward_length": each(sizes.widths), "attention.head_count": each(sizes.heads),
        "attention.head_count_kv": each(sizes.groups),
        "attention.key_length": sizes.head_dim, "attention.value_length": sizes.head_dim}
    if arch.rotary:
        part = config.rope_parameters.get("partial_rotary_factor", 1.0)
        found |= {"rope.freq_base": float(config.rope_parameters["rope_theta"]),
                  "rope.dimension_count": int(sizes.head_dim * part)}
    return found | {key: float(getattr(config, entry)) for key, entry in arch.reads.items()}


def _put(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, int(value))


def _file_type(kind: str) -> str:
    return {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}.get(
        kind, f"MOSTLY_{kind.upper()}")


def _typed(gguf: ModuleType, name: str, array: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """An array in the file's type, and that type; vectors stay float32.

    Raises UsageError for rows that are no whole number of blocks.
    """
    stored = gguf.GGMLQuantizationType
    if array.ndim < 2 or kind == "f32" or name.startswith("rope_freqs"):
        return np.ascontiguousarray(array, dtype=np.float32), stored.F32
    if kind.startswith("q") and array.shape[-1] % BLOCK:
        raise UsageError(
            f"{name} cannot be stored as {kind}", where="--gguf",
            why=f"its rows have {array.shape[-1]} values, which is no multiple of {BLOCK}",
            fix=f"use --for llama.cpp-q8 or --align {BLOCK}; or --gguf f16")
    found = stored[kind.upper()]
    return gguf.quants.quantize(np.ascontiguousarray(array), found), found


def differing(one: Path, other: Path) -> str:
    """Return which array, or entry that both have, is not the same in two files, or ""."""
    gguf = _package()
    files = [gguf.GGUFReader(path) for path in (one, other)]
    arrays = [{t.name: (int(t.tensor_type), t.data.tobytes()) for t in f.tensors} for f in files]
    entries = [{k: v.contents() for k, v in f.fields.items() if not k.startswith("GGUF.")}
               for f in files]
    names = sorted(arrays[0].keys() | arrays[1].keys())
    odd = [n for n in names if arrays[0].get(n) != arrays[1].get(n)]
    return next(iter(odd), "") or next(
        (k for k in entries[0] if k in entries[1] and entries[0][k] != entries[1][k]), "")


def _read_back(gguf: ModuleType, path: Path, made: Mapping[str, tuple[np.ndarray, Any]]) -> None:
    """Raise ProofError unless the file holds exactly these arrays, bit by bit."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name in sorted(found.keys() | made.keys()):
        if name not in found or name not in made or found[name].tensor_type != made[name][1] \
                or found[name].data.tobytes() != made[name][0].tobytes():
            raise ProofError("the GGUF file does not hold what was written", where=name,
                             fix="please report it")
