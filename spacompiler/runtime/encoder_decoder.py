"""Run an encoder-decoder's two files with ONNX Runtime and numpy alone.

    from spacompiler.runtime import EncoderDecoder

    model = EncoderDecoder("pruned")                 # a directory written with --decoder
    model.read(input_ids=[[37, 423, 55, 1]])
    tokens = model.generate([[0]], 32)               # after the token that starts what is written
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike

from ..errors import SpaError, UsageError
from .decoder import Cache, Decoder
from .session import PLACES, open_session

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
CROSS = "cross.{}.{}"
"""Names of what the decoder reads of the encoder, of layer and part (``key`` or ``value``)."""


def pair_folder(path: Path) -> Path:
    """Return where in a directory both files lie, or would lie."""
    places = [(path / name).parent for name in PLACES]
    return next((p for p in places for name in (ENCODER, DECODER) if (p / name).exists()), path)


class EncoderDecoder(Decoder):
    """A decoder with its cache, and the encoder whose keys and values it reads.

    Args:
        path: a directory that holds ``encoder.onnx`` and ``decoder.onnx``, or an ``onnx`` with
            them.
        threads: threads inside an operator.

    Raises:
        SpaError: a file is missing or damaged.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        place = pair_folder(Path(path))
        super().__init__(place / DECODER, threads=threads)
        self._encoder = open_session(place / ENCODER, threads=threads)

    def read(self, **inputs: ArrayLike) -> None:
        """Encode what is to be read from now on: (batch, …) each, a mask of ones if none is given.

        Raises:
            UsageError: inputs that the encoder has not, or lacks. SpaError: a kernel fails.
        """
        wanted = {i.name: i.type for i in self._encoder.get_inputs()}
        given = {name: np.asarray(value, np.int64 if "int64" in wanted.get(name, "int64")
                                  else np.float32) for name, value in inputs.items()}
        if "attention_mask" in wanted and "input_ids" in given:
            given.setdefault("attention_mask", np.ones_like(given["input_ids"]))
        if given.keys() != wanted.keys():
            raise UsageError(f"the encoder reads {', '.join(wanted)}",
                             why=f"given: {', '.join(given)}")
        names = [o.name for o in self._encoder.get_outputs()]
        try:
            made = self._encoder.run_with_ort_values(
                names, {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a))
                        for n, a in given.items()})
        except Exception as problem:  # ONNX Runtime raises its own kinds
            raise SpaError("the encoder does not run on this", why=str(problem),
                           fix="token numbers must be below the vocabulary's size") from problem
        self.beside = dict(zip(names, made, strict=True))
        if "attention_mask" in given:
            self.beside["encoder_attention_mask"] = ort.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(given["attention_mask"]))

    def run(self, ids: ArrayLike, cache: Cache | None = None, *,
            mask: ArrayLike | None = None) -> tuple[np.ndarray, Cache]:
        """Read tokens after those of a cache, as a decoder does, with what was encoded.

        Raises:
            UsageError: nothing was encoded, or the shapes do not fit. SpaError: a kernel fails.
        """
        if not self.beside:
            raise UsageError("nothing was encoded yet",
                             why="the decoder writes of what the encoder has read",
                             fix="call read(...) with the encoder's inputs first")
        encoded = next(iter(self.beside.values())).shape()[0]
        if encoded != len(np.asarray(ids)):
            raise UsageError("tokens and what was encoded do not fit",
                             why=f"{len(np.asarray(ids))} rows of tokens, {encoded} rows encoded",
                             fix="give a row of tokens for each row that was read")
        return super().run(ids, cache, mask=mask)
