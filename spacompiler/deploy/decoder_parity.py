"""Compare an exported decoder with its torch model, token by token."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..runtime.decoder import Cache, Decoder
from ..stages.comparison import compare

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

STEPS = 32


@dataclass(frozen=True, slots=True)
class DecoderParity:
    """One greedy run: ONNX Runtime carries its own cache, both read torch's tokens.

    `max_rel` is the largest difference of logits over the largest logit; `same` of `tokens` most
    likely next tokens agree (all of them: the free-running loops write the same text).
    """

    batch: int
    prompt: int
    padding: int
    tokens: int
    same: int
    max_rel: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as the report holds them."""
        return asdict(self)


def decoder_parity(model: PreTrainedModel, path: Path, *,
                   steps: int = STEPS) -> list[DecoderParity]:
    """Run a file against its model: one row, then three rows with padding, at untraced lengths.

    Raises:
        SpaError: the file does not open or run.
    """
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or 2**20
    decoder = Decoder(path)
    return [_greedy(model, decoder, config.vocab_size, batch, prompt, padding,
                    max(1, min(steps // share, room - prompt)))
            for batch, prompt, padding, share in ((1, 7, 0, 1), (3, 4, 2, 4))]


def _greedy(model: PreTrainedModel, decoder: Decoder, vocabulary: int, batch: int, prompt: int,
            padding: int, steps: int) -> DecoderParity:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    cache: Cache | None = None
    past, same, pairs = None, 0, []
    for _ in range(steps):
        want, past = step(model, ids, mask, past)
        got, cache = decoder.run(ids.numpy(), cache, mask=mask[:, -ids.shape[1]:].numpy())
        real = mask[:, -ids.shape[1]:].bool().numpy()
        pairs.append([_rows(logits, real) for logits in (got, want)])
        same += int((got[:, -1].argmax(-1) == want[:, -1].argmax(-1)).sum())
        ids = torch.from_numpy(want[:, -1].argmax(-1))[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    gap = compare(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return DecoderParity(batch, prompt, padding, steps * batch, same, gap.relative)


def _rows(logits: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The logits (rows, vocabulary) of tokens that are no padding."""
    return logits[real] if logits.shape[:2] == real.shape else logits.reshape(-1, logits.shape[-1])


def step(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, past: DynamicCache | None
         ) -> tuple[np.ndarray, DynamicCache]:
    """Return torch's logits (batch, sequence, vocabulary) and its own kind of cache."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    with torch.no_grad():
        out = model(**inputs, past_key_values=past, use_cache=True)
    return out.logits.float().numpy(), out.past_key_values
