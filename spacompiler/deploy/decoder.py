"""A causal language model as an ONNX file whose key/value cache goes in and comes out.

One file serves for reading a prompt (an empty cache) and for writing on (a cache of any length):

    input_ids       (batch, sequence)        logits           (batch, sequence, vocabulary)
    attention_mask  (batch, total)           present.N.key    (batch, heads, past + sequence, dim)
    position_ids    (batch, sequence)        present.N.value
    past_key_values.N.key, .N.value  (batch, heads, past, dim)

These are the names that onnxruntime-genai and optimum know. Heads and dims may differ from layer
to layer: they are read off a run of the model, no configuration is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ..errors import SpaError
from ..runtime.decoder import PAST, PRESENT
from ..system.process import quiet
from ..torch_backend.kinds import is_encoder_decoder, writes_text
from ..torch_backend.read.export import drop_asserts
from .export import FORM, Form, export_onnx

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

_BATCH, _SEQUENCE, _PAST_LENGTH = 2, 3, 5
_ENDS = ("max_position_embeddings", "max_target_positions")
_FEWEST = 16
"""No length is bound below what is traced."""
_AXES = {"input_ids": {0: "batch", 1: "sequence"}, "position_ids": {0: "batch", 1: "sequence"},
         "attention_mask": {0: "batch", 1: "total"}}


NO_HEAD = "it has no head that writes text"
"""Why a network of transformers that gives hidden states, or classes, is no decoder."""


def check_causal_lm(module: PreTrainedModel) -> None:
    """Raise SpaError unless a module is a causal language model that keeps keys and values."""
    what = "this model cannot be exported as a decoder with a cache"
    accepts = inspect.signature(module.forward).parameters if hasattr(module, "forward") else {}
    missing = [n for n in ("input_ids", "attention_mask", "past_key_values") if n not in accepts]
    if missing or is_encoder_decoder(module) or not writes_text(module):
        why = f"its forward takes no {missing[0]}" if missing else \
            "it has an encoder as well" if is_encoder_decoder(module) else NO_HEAD
        raise SpaError(what, where=type(module).__name__, why=why,
                       fix="leave --decoder out, or give a causal language model of transformers")
    try:
        cache = _fresh_cache(module)
    except Exception as problem:  # a state of its own is looked for in many ways
        raise SpaError(what, where=type(module).__name__,
                       why="it does not run with keys and values alone between tokens "
                           f"({type(problem).__name__}: {problem})".splitlines()[0],
                       fix="leave --decoder out") from problem
    kinds = sorted({type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"})
    if kinds or not cache.layers or not all(layer.is_initialized for layer in cache.layers):
        raise SpaError(what, where=type(module).__name__,
                       why=f"it keeps {', '.join(kinds) or 'no keys and values'} between tokens",
                       fix="leave --decoder out")


def _fresh_cache(module: PreTrainedModel, length: int = _PAST_LENGTH) -> Any:
    """The cache after a few tokens: its shapes are those of the inputs."""
    from transformers import DynamicCache

    ids = torch.zeros(_BATCH, length, dtype=torch.long)
    with torch.no_grad():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True,
                      past_key_values=DynamicCache()).past_key_values


class CachedDecoder(nn.Module):
    """The model with its cache as plain tensors: keys and values of layer 0, layer 1, …"""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, past: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """Return logits and the longer cache; `inputs` in the order of `names`."""
        named = dict(zip(self.names, inputs, strict=True))
        out = self.model(**named, past_key_values=as_cache(past), use_cache=True)
        return [out.logits, *flat(out.past_key_values)]


def as_cache(past: list[Tensor]) -> Any:
    """Wrap tensors as transformers' cache, without the copies that its constructor makes."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def flat(cache: DynamicCache) -> list[Tensor]:
    """Return keys and values of layer 0, layer 1, …"""
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@dataclass(frozen=True)
class Traced:
    """A traced decoder and what its file's inputs and outputs are called."""

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]


def trace_decoder(model: PreTrainedModel) -> Traced:
    """Trace a model with a cache; batch, sequence and past length stay free.

    Attention is traced as plain products and a softmax with a finite mask: that is what ONNX
    Runtime fuses best, and it needs no guard against rows that see nothing.

    Raises:
        SpaError: the model cannot be traced.
    """
    past = flat(_fresh_cache(model))
    total = _PAST_LENGTH + _SEQUENCE
    inputs = {"input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
              "attention_mask": torch.ones(_BATCH, total, dtype=torch.long)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_PAST_LENGTH, total).repeat(_BATCH, 1)
    try:
        with quiet(), torch.no_grad(), plain_kernels(model):
            program = _program(model, past, inputs)
    except Exception as problem:  # the tracer raises many kinds
        raise SpaError("the decoder cannot be traced with its cache", where=type(model).__name__,
                       why=(str(problem).strip().splitlines() or [repr(problem)])[0],
                       fix="leave --decoder out: model.onnx is then written without a cache"
                       ) from problem
    drop_asserts(program.graph)
    read_sizes_of_ids(program.graph)
    program.graph_module.recompile()
    parts = [(i, part) for i in range(len(past) // 2) for part in ("key", "value")]
    return Traced(program, [*(PAST.format(*p) for p in parts), *inputs],
                  ["logits", *(PRESENT.format(*p) for p in parts)])


def places(model: PreTrainedModel) -> int | None:
    """How many tokens have places, where a table of them may end there; None where none is said.

    Where a cache and what is new each stay below half of that, code that asks whether its table is
    long enough is traced without asking. The files themselves are not bounded.
    """
    sizes = (getattr(model.config.get_text_config(decoder=True), n, None) for n in _ENDS)
    return next((max(n, _FEWEST) for n in sizes if isinstance(n, int) and n > 1), None)


def _program(model: PreTrainedModel, past: list[Tensor],
             inputs: dict[str, Tensor]) -> ExportedProgram:
    """Trace with every length free, or else below the end of a table of places."""
    def traced(most: int | None) -> ExportedProgram:
        batch, half = Dim("batch"), most and most // 2
        sequence, length = Dim("sequence", max=half), Dim("past", max=half)
        free = {"input_ids": {0: batch, 1: sequence}, "position_ids": {0: batch, 1: sequence},
                "attention_mask": {0: batch, 1: Dim.AUTO}}
        return torch.export.export(
            CachedDecoder(model, list(inputs)), (past, list(inputs.values())), strict=False,
            dynamic_shapes=([{0: batch, 2: length} for _ in past], [free[n] for n in inputs]))

    try:
        return traced(None)
    except Exception:  # the tracer raises many kinds
        if (most := places(model)) is None:
            raise
        return traced(most)


def read_sizes_of_ids(graph: fx.Graph) -> None:
    """Let batch and sequence be sizes of `input_ids`, the first input beside the cache.

    The tracer reads a size where it likes; a loop may start with a cache of batch 0.
    """
    ids = next(node for node in graph.nodes if node.name == "inputs_0")
    known = {str(size): d for d, size in enumerate(ids.meta["val"].shape)}
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and str(node.meta["val"]) in known:
            node.args = (ids, known[str(node.meta["val"])])


@contextmanager
def plain_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute attention and experts by plain operators for a while."""
    config = model.config
    attention, experts = config._attn_implementation, config._experts_implementation
    model.set_attn_implementation("eager")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts)


def export_decoder(model: PreTrainedModel, path: Path, *, beside: Sequence[Path] = (),
                   form: Form = FORM) -> tuple[Path, ...]:
    """Write a causal language model with its cache; `beside` and `form` are as for `export_onnx`.

    Raises:
        SpaError: the model cannot be traced or expressed.
    """
    traced = trace_decoder(model)
    axes = {name: {0: "batch", 2: "past"} for name in traced.inputs if name not in _AXES}
    axes |= {name: _AXES[name] for name in traced.inputs if name in _AXES}
    return export_onnx(traced.program, path, input_names=traced.inputs,
                       output_names=traced.outputs, axes=axes, beside=beside, form=form)
