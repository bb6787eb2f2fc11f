"""Run exported language models with ONNX Runtime and numpy alone: torch is not imported.

    from spacompiler.runtime import Decoder

    decoder = Decoder("pruned")                      # a directory written with --decoder, or a file
    tokens = decoder.generate([[1, 504, 302]], 32)   # (batch, new tokens), greedy
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike

from ..errors import SpaError, UsageError
from .session import model_file, open_session

PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"
"""Names of the cache going in and coming out, of layer and part (``key`` or ``value``)."""
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True, slots=True)
class Cache:
    """What a decoder remembers: `mask` (batch, total) of the tokens so far, and keys and values.

    `past` holds ONNX Runtime's own arrays (batch, heads, total, dim) by the name they go in under.
    """

    mask: np.ndarray
    past: dict[str, ort.OrtValue]

    @property
    def length(self) -> int:
        """How many tokens are remembered, padding included."""
        return int(self.mask.shape[1])


def cache_names(names: Collection[str]) -> dict[str, str]:
    """Return {present output: past input} of the layers that a model's inputs name, in order."""
    found = {}
    for layer in range(len(names)):
        for part in ("key", "value"):
            if (past := PAST.format(layer, part)) in names:
                found[PRESENT.format(layer, part)] = past
    return found


class Decoder:
    """A causal language model with its key/value cache as inputs and outputs.

    Args:
        path: a directory that holds ``model.onnx`` (or ``onnx/model.onnx``), or the file.
        threads: threads inside an operator.

    Raises:
        SpaError: no such file, or the model has no cache to carry (export it with ``--decoder``).
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        file = model_file(Path(path))
        self.session = open_session(file, threads=threads)
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.names = cache_names(inputs)
        if not self.names:
            raise SpaError("the model has no key/value cache", where=str(file),
                           why=f"its inputs are {', '.join(inputs)}",
                           fix="compile it with --decoder")
        self._takes = {name for name in ("attention_mask", "position_ids") if name in inputs}
        self._empty = {name: inputs[name] for name in self.names.values()}
        self._outputs = ["logits", *self.names]
        self.beside: dict[str, ort.OrtValue] = {}

    def start(self, batch: int) -> Cache:
        """Return an empty cache for a number of rows."""
        past = {}
        for name, declared in self._empty.items():
            shape = (batch, declared.shape[1], 0, declared.shape[3])
            past[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[declared.type]))
        return Cache(np.zeros((batch, 0), np.int64), past)

    def run(self, ids: ArrayLike, cache: Cache | None = None, *,
            mask: ArrayLike | None = None) -> tuple[np.ndarray, Cache]:
        """Read tokens after those of a cache.

        Args:
            ids: (batch, sequence) token numbers.
            cache: what came before; None for nothing.
            mask: (batch, sequence), 0 where a token is padding (on the left); None for no padding.

        Returns:
            Logits (batch, sequence, vocabulary), and the cache with these tokens added.

        Raises:
            UsageError: the shapes do not fit. SpaError: a kernel fails.
        """
        tokens = _rows(ids)
        cache = cache if cache is not None else self.start(len(tokens))
        new = np.ones_like(tokens) if mask is None else _rows(mask)
        if new.shape != tokens.shape or len(cache.mask) != len(tokens):
            raise UsageError("tokens, mask and cache do not fit",
                             why=f"tokens {tokens.shape}, mask {new.shape}, "
                                 f"{len(cache.mask)} rows in the cache")
        if "attention_mask" not in self._takes and not new.all():
            raise UsageError("this decoder does not know of padding",
                             why="its file takes no attention_mask",
                             fix="give rows of equal length, without a mask")
        whole = np.concatenate([cache.mask, new], axis=1)
        positions = np.maximum(np.cumsum(whole, axis=1) - 1, 0)[:, cache.length:]
        given = {"input_ids": tokens, "attention_mask": whole, "position_ids": positions}
        feed = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(given[name]))
                for name in ("input_ids", *sorted(self._takes))}
        try:
            logits, *present = self.session.run_with_ort_values(
                self._outputs, {**feed, **self.beside, **cache.past})
        except Exception as problem:  # ONNX Runtime raises its own kinds
            raise SpaError("the decoder does not run on these tokens", why=str(problem),
                           fix="token numbers must be below the vocabulary's size") from problem
        return logits.numpy(), Cache(whole, dict(zip(self.names.values(), present, strict=True)))

    def stream(self, ids: ArrayLike, *, mask: ArrayLike | None = None) -> Iterator[np.ndarray]:
        """Yield the most likely next token of each row, (batch,), without end."""
        logits, cache = self.run(ids, mask=mask)
        while True:
            tokens = logits[:, -1].argmax(-1).astype(np.int64)
            yield tokens
            logits, cache = self.run(tokens[:, None], cache)

    def generate(self, ids: ArrayLike, tokens: int, *, mask: ArrayLike | None = None,
                 stop: Collection[int] = ()) -> np.ndarray:
        """Return the next tokens of each row, greedily: (batch, at most `tokens`).

        `stop` are tokens that end a row; a row that ended repeats its last token until all have.
        """
        made: list[np.ndarray] = []
        for step in self.stream(ids, mask=mask) if tokens > 0 else ():
            if made:
                step = np.where(np.isin(made[-1], list(stop)), made[-1], step)
            made.append(step)
            if len(made) == tokens or np.isin(step, list(stop)).all():
                break
        return np.stack(made, axis=1) if made else np.zeros((len(_rows(ids)), 0), np.int64)


def _rows(values: ArrayLike) -> np.ndarray:
    """Token numbers as (batch, sequence)."""
    rows = np.asarray(values, dtype=np.int64)
    if rows.ndim != 2 or not rows.size:
        raise UsageError(f"tokens must be rows of equal length, not of shape {rows.shape}",
                         fix="give a list of lists; pad on the left and give a mask")
    return rows
