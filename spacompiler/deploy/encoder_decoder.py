"""An encoder-decoder as two ONNX files: what is read once, and what writes on with its cache.

    encoder.onnx   input_ids, input_features or input_values, attention_mask (of text)
                -> cross.N.key, cross.N.value  (batch, heads, encoded, dim)
    decoder.onnx   input_ids (batch, sequence), encoder_attention_mask (batch, encoded), cross.N.…,
                   past_key_values.N.key, .N.value (batch, heads, past, dim)
                -> logits, present.N.key, present.N.value

Keys and values that the decoder reads of what was encoded are computed with it, once, and not for
each token that is written. `spacompiler.runtime.EncoderDecoder` runs both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import SpaError
from ..runtime.decoder import PAST, PRESENT
from ..runtime.encoder_decoder import CROSS, DECODER, ENCODER, EncoderDecoder
from ..stages.comparison import compare
from ..system.process import quiet
from ..torch_backend.kinds import writes_text
from ..torch_backend.read.export import drop_asserts
from .decoder import NO_HEAD, Traced, as_cache, flat, places, plain_kernels, read_sizes_of_ids
from .decoder_parity import DecoderParity
from .export import FORM, Form, export_onnx

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache, PreTrainedModel

_ENCODED, _PAST, _SEQUENCE, _STEPS = 7, 5, 3, 16


class EncoderSide(nn.Module):
    """What is encoded, as the keys and values that each layer of the decoder reads of it."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return keys and values (batch, heads, encoded, dim) of layer 0, layer 1, …"""
        named = dict(zip(self.names, inputs, strict=True))
        encoded = self.model.get_encoder()(**named).last_hidden_state
        ids = torch.zeros_like(encoded[:, :1, 0], dtype=torch.long)
        cache = _step(self.model, ids, encoded, named.get("attention_mask"), _joint([], [])).past
        return flat(cache.cross_attention_cache)


class DecoderSide(nn.Module):
    """The decoder, with its cache and what was encoded as plain tensors."""

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def forward(self, past: list[Tensor], cross: list[Tensor],
                inputs: list[Tensor]) -> list[Tensor]:
        """Return logits and the longer cache."""
        ids, mask = (*inputs, None)[:2]
        encoded = cross[0].new_zeros(cross[0].shape[0], cross[0].shape[2], self.width)
        made = _step(self.model, ids, encoded, mask, _joint(past, cross))
        return [made.logits, *flat(made.past.self_attention_cache)]


class _Made:
    """What a step of the decoder gives."""

    def __init__(self, logits: Tensor, past: EncoderDecoderCache) -> None:
        self.logits, self.past = logits, past


@cache
def _encoded_kind() -> Any:
    """What an encoder gives, of which all but the last hidden state is None."""
    from transformers.modeling_outputs import BaseModelOutput

    @dataclass
    class Encoded(BaseModelOutput):
        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Encoded


def _step(model: PreTrainedModel, ids: Tensor | None, encoded: Tensor, mask: Tensor | None,
          cache: EncoderDecoderCache) -> _Made:
    out = model(decoder_input_ids=ids, encoder_outputs=_encoded_kind()(encoded),
                attention_mask=mask, past_key_values=cache, use_cache=True)
    return _Made(out.logits, out.past_key_values)


def _joint(past: list[Tensor], cross: list[Tensor]) -> EncoderDecoderCache:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(as_cache(past) if past else DynamicCache(),
                               as_cache(cross) if cross else DynamicCache())


def check_encoder_decoder(module: PreTrainedModel) -> None:
    """Raise SpaError unless a model reads text or sound and writes text."""
    name = module.main_input_name
    reads = name in ("input_ids", "input_features", "input_values")
    if not reads or not writes_text(module):
        raise SpaError("this model cannot be exported as an encoder and a decoder",
                       where=type(module).__name__, why=NO_HEAD if reads else f"it reads {name}",
                       fix="leave --decoder out, or give the class that generates")


def _encoder_inputs(model: PreTrainedModel, example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of the encoder, in order: text of a few tokens with a mask, or the example's sound."""
    if model.main_input_name == "input_ids":
        ids = torch.zeros(2, _ENCODED, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sound: Tensor = example[model.main_input_name]
    return {model.main_input_name: torch.cat([sound, sound])[:2]}


def trace_pair(model: PreTrainedModel, example: Mapping[str, Any]) -> tuple[Traced, Traced]:
    """Trace both sides; batch, lengths of text and of the cache stay free.

    Raises:
        SpaError: the model cannot be traced so.
    """
    inputs = _encoder_inputs(model, example)
    try:
        with quiet(), torch.no_grad(), plain_kernels(model):
            once, again = _programs(model, inputs)
    except Exception as problem:  # the tracer raises many kinds
        raise SpaError("the encoder and the decoder cannot be traced with a cache",
                       where=type(model).__name__,
                       why=(str(problem).strip().splitlines() or [repr(problem)])[0],
                       fix="leave --decoder out: model.onnx is then written without a cache"
                       ) from problem
    for program in (once, again):
        drop_asserts(program.graph)
    read_sizes_of_ids(again.graph)
    for program in (once, again):
        program.graph_module.recompile()
    count = len(once.graph_signature.user_outputs) // 2
    parts = [(i, part) for i in range(count) for part in ("key", "value")]
    read = [CROSS.format(*p) for p in parts]
    given = ["input_ids", *(["encoder_attention_mask"] if "attention_mask" in inputs else [])]
    return Traced(once, list(inputs), read), Traced(
        again, [*(PAST.format(*p) for p in parts), *read, *given],
        ["logits", *(PRESENT.format(*p) for p in parts)])


def _programs(model: PreTrainedModel,
              inputs: Mapping[str, Tensor]) -> tuple[ExportedProgram, ExportedProgram]:
    text = "attention_mask" in inputs
    most = places(model)
    batch, encoded = Dim("batch"), Dim("encoded", max=most)
    past_size, sequence = (Dim(n, max=most and most // 2) for n in ("past", "sequence"))
    first, values = EncoderSide(model, list(inputs)), list(inputs.values())
    cross, width = first(values), model.get_encoder()(**inputs).last_hidden_state.shape[-1]
    free = {0: batch, 1: encoded} if text else {0: batch}
    once = torch.export.export(first, (values,), dynamic_shapes=([free] * len(inputs),),
                               strict=False)
    past = [t.new_zeros(t.shape[0], t.shape[1], _PAST, t.shape[3]) for t in cross]
    given = [torch.zeros(len(cross[0]), _SEQUENCE, dtype=torch.long),
             *([inputs["attention_mask"]] if text else [])]
    shapes = ([{0: batch, 2: past_size}] * len(past), [{0: batch, 2: encoded}] * len(past),
              [{0: batch, 1: sequence}, {0: batch, 1: encoded}][:len(given)])
    return once, torch.export.export(DecoderSide(model, width), (past, cross, given),
                                     dynamic_shapes=shapes, strict=False)


_AXES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"},
         "encoder_attention_mask": {0: "batch", 1: "encoded"}, "input_features": {0: "batch"},
         "input_values": {0: "batch"}}


def export_pair(model: PreTrainedModel, example: Mapping[str, Any], folder: Path, *,
                beside: Sequence[Path] = (), form: Form = FORM) -> tuple[Path, ...]:
    """Write encoder.onnx and decoder.onnx; `beside` and `form` are as for `export_onnx`.

    Raises:
        SpaError: the model cannot be traced or expressed.
    """
    made: list[Path] = []
    for name, traced in zip((ENCODER, DECODER), trace_pair(model, example), strict=True):
        axes = {n: _AXES.get(n, {0: "batch", 2: "past" if n.startswith("past") else "encoded"})
                for n in traced.inputs}
        made += export_onnx(traced.program, folder / name, input_names=traced.inputs,
                            output_names=traced.outputs, axes=axes, beside=beside, form=form)
    return tuple(made)


def pair_parity(model: PreTrainedModel, example: Mapping[str, Any],
                folder: Path) -> list[DecoderParity]:
    """Run both files against their model: one row, then three of which one is padded at the end."""
    runner = EncoderDecoder(folder)
    return [_greedy(model, runner, _read(model, example, rows, length, padding), padding)
            for rows, length, padding in ((1, 9, 0), (3, 6, 2))]


def _read(model: PreTrainedModel, example: Mapping[str, Any], rows: int, length: int,
          padding: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    if model.main_input_name != "input_ids":
        sound = example[model.main_input_name][:1]
        return {model.main_input_name: torch.cat([
            sound + torch.randn(sound.shape, generator=generator) for _ in range(rows)])}
    count = model.get_input_embeddings().num_embeddings
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - padding:] = 0
    return {"input_ids": torch.randint(count, (rows, length), generator=generator),
            "attention_mask": mask}


def _greedy(model: PreTrainedModel, runner: EncoderDecoder, given: Mapping[str, Tensor],
            padding: int) -> DecoderParity:
    runner.read(**{name: value.numpy() for name, value in given.items()})
    mask, cache, other, pairs, same = given.get("attention_mask"), None, _joint([], []), [], 0
    with torch.no_grad():
        encoded = model.get_encoder()(**given).last_hidden_state
        ids = torch.zeros(len(encoded), 1, dtype=torch.long)
        for _ in range(_STEPS):
            made = _step(model, ids, encoded, mask, other)
            want, other = made.logits.float().numpy(), made.past
            got, cache = runner.run(ids.numpy(), cache)
            pairs.append((got, want))
            same += int((got[:, -1].argmax(-1) == want[:, -1].argmax(-1)).sum())
            ids = torch.from_numpy(want[:, -1].argmax(-1))[:, None]
    gap = compare(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return DecoderParity(len(encoded), encoded.shape[1], padding, _STEPS * len(encoded), same,
                         gap.relative)
