"""Windows of text as calls of a network: as long as it takes, with what else its call holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from ...evidence.calibration import Calibration
from ...evidence.calls import Batch
from ...evidence.losses import IGNORED
from ..untouched import untouched
from .families import family

SHARE = 0.15  # of the tokens of a window that a masked language model is asked for
TOKENS = "input_ids"
# what else a call may hold beside tokens -> how it follows from them
BESIDE: Mapping[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "attention_mask": lambda module, ids: torch.ones_like(ids),
    "decoder_attention_mask": lambda module, ids: torch.ones_like(ids),
    "token_type_ids": lambda module, ids: torch.zeros_like(ids),
    "decoder_input_ids": lambda module, ids: _begun(module, ids),
}


def _begun(module: object, ids: torch.Tensor) -> torch.Tensor:
    """What a decoder reads to write these tokens."""
    make = getattr(module, "prepare_decoder_input_ids_from_labels", None)
    return ids if make is None else make(labels=ids)


def positions(module: object) -> int | None:
    """Return how many tokens a network's configuration gives it places for, or None."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


@dataclass(frozen=True)
class Reader:
    """Reads text for a network that is called as `example` is."""

    module: Any
    example: Batch
    tokenizer: Any = None

    @property
    def refusal(self) -> str:
        """Why text is no input of this network, or ""."""
        if not isinstance(self.module, nn.Module):
            return ""
        given = {name: x for name, x in self._named().items() if isinstance(x, torch.Tensor)}
        if not given:
            return ""
        ids = given.pop(self._tokens(), None)
        if ids is None or ids.ndim != 2:
            return "its call holds no rows of tokens (input_ids)"
        other = sorted(given.keys() - BESIDE.keys())
        return f"its call holds {other[0]} beside tokens" if other else ""

    def read(self, found: Callable[[int], Calibration], length: int) -> Calibration:
        """Return `found(length)`, or of as many tokens as the network takes, as calls of it.

        Raises UsageError if text is no input of the network.
        """
        if self.refusal:
            raise UsageError("calibration by text does not fit this network", why=self.refusal,
                             fix="give batches of its inputs, or --calibration none")
        if not isinstance(self.module, nn.Module):
            return found(length)
        fits = self._length(length)
        made = found(fits)
        why = "" if fits == length else f", {fits} tokens a window (no more fit)"
        masks = family(self.module) == "masked" and \
            getattr(self.tokenizer, "mask_token_id", None) is not None
        why += f", {SHARE:.0%} of them masked" if masks else ""
        generator = torch.Generator().manual_seed(0)
        batches, held_out, beside = (
            [self._call(kwargs[TOKENS], generator if masks else None) for _, kwargs in some]
            for some in (made.batches, made.held_out, made.beside))
        return replace(made, origin=made.origin + why, batches=batches, held_out=held_out,
                       beside=beside)

    def _named(self) -> dict[str, Any]:
        args, kwargs = self.example
        names = tuple(inspect.signature(self.module.forward).parameters)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def _tokens(self) -> str:
        """The name under which this network takes tokens: of its own code, the one that can be."""
        given = self._named()
        whole = [k for k, v in given.items() if isinstance(v, torch.Tensor)
                 and v.ndim == 2 and v.dtype == torch.int64]
        return TOKENS if TOKENS in given or len(whole) != 1 else whole[0]

    def _call(self, ids: torch.Tensor, masking: torch.Generator | None) -> Batch:
        labels = {}
        if masking is not None:
            chosen = torch.rand(ids.shape, generator=masking) < SHARE
            chosen[:, 0] |= ~chosen.any(1)
            labels = {"labels": ids.masked_fill(~chosen, IGNORED)}
            ids = ids.masked_fill(chosen, self.tokenizer.mask_token_id)
        tokens = self._tokens()
        made = {name: ids if name == tokens else BESIDE[name](self.module, ids)
                for name, x in self._named().items() if isinstance(x, torch.Tensor)}
        made = made or {TOKENS: ids}
        args = tuple(made.pop(name) if name in made else x for name, x in
                     zip(self._named(), self.example[0], strict=False))
        return args, {**made, **labels}

    def _length(self, asked: int) -> int:
        """As many tokens as the configuration says, and the network is seen to run on."""
        shape = self._named().get(self._tokens())
        own = shape.shape[-1] if isinstance(shape, torch.Tensor) else asked
        most = min(asked, positions(self.module) or asked)
        tries = dict.fromkeys(n for n in (most, most - 2, most // 2, own) if 2 <= n <= asked)
        return next((n for n in tries if self._runs(n)), most)

    def _runs(self, length: int) -> bool:
        known = self._named().get(self._tokens())
        row = known[:1] if isinstance(known, torch.Tensor) else torch.zeros(1, 1).long()
        ids = row[:, torch.arange(length) % row.shape[-1]]
        args, kwargs = self._call(ids, None)
        constants = {k: v for k, v in self.example[1].items() if not isinstance(v, torch.Tensor)}
        try:
            with untouched(self.module), torch.no_grad():
                self.module(*args, **{**constants, **kwargs})
        except Exception:  # any code may run here: it takes fewer
            return False
        return True
