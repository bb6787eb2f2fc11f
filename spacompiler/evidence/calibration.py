"""Calibration: batches from a text file, from the model's own source, or none; and losses."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, Unpack

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ..errors import SpaError, UsageError
from .calls import Batch
from .prototypes import Order


class Tokenizer(Protocol):
    """Turns text into token numbers, as tokenizers of transformers do."""

    def __call__(self, text: str, **options: object) -> Any:
        """Return the tokens as `input_ids`, (1, n) where tensors are asked for."""


@dataclass(frozen=True)
class Calibration:
    """Batches of (args, kwargs) and where they came from.

    `beside` are further windows, and what the model itself wrote on (see `sampling.continued`):
    repair is fit to them too, and so are scores by covariance and curvature. `held_out` are
    batches that nothing but the comparison of dense and pruned looks at. `taken` are the options
    of a recipe that say how much was read, where it was drawn from more.
    """

    origin: str
    batches: Sequence[Batch] = field(default=())
    real: bool = True
    beside: Sequence[Batch] = field(default=())
    held_out: Sequence[Batch] = field(default=())
    taken: Mapping[str, int] = field(default_factory=dict)

    @property
    def for_repair(self) -> list[Batch]:
        """All batches: those that gradients are taken of, then those beside."""
        return [*self.batches, *self.beside]


def windows(tokenizer: Tokenizer, text: str, length: int) -> torch.Tensor:
    """Return non-overlapping windows of a text's tokens (taken in one piece): (n, length).

    Each begins with what the tokenizer puts before a text (a start token, where it has one): some
    networks are lost without it, and their first position is like no other.
    """
    ids = _tokens(tokenizer, text, special=False)
    before = begins(tokenizer, text)
    step = max(1, length - len(before))
    rows = ids[: len(ids) // step * step].reshape(-1, step)
    return torch.cat([before.expand(len(rows), -1), rows], 1)[:, :length]


def _tokens(tokenizer: Tokenizer, text: str, *, special: bool) -> torch.Tensor:
    try:
        found: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=special,
                                        verbose=False).input_ids[0]
    except (TypeError, AttributeError) as problem:
        raise SpaError("text cannot be read by this tokenizer", where=type(tokenizer).__name__,
                       why=str(problem), fix="give one that is called as those of transformers "
                       "are, or batches of tokens as calibration") from problem
    return found


def begins(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the tokens that a tokenizer puts before a text by itself: (n,), n mostly 0 or 1."""
    plain, framed = (_tokens(tokenizer, text[:SOME], special=special) for special in (False, True))
    for at in range(len(framed) - len(plain) + 1):
        if torch.equal(framed[at:at + len(plain)], plain):
            return framed[:at]
    return framed[:0]


class Draw(TypedDict):
    """How many windows are drawn of a text, of how many tokens, by which seed, how many are in a
    batch; `further` ones lie beside."""

    samples: int
    length: int
    batch: int
    seed: int
    further: NotRequired[int]


def from_text(path: str, tokenizer: Tokenizer | None, *, order: Order | None = None,
              **draw: Unpack[Draw]) -> Calibration:
    """Return `samples` windows of `length` tokens, drawn without replacement from a text file.

    With `order` they are the first of all windows in that order; `further` windows lie beside.

    Raises SpaError if the file is missing, empty, no text, or shorter than one window.
    """
    place = Path(path)
    if not os.path.isfile(place):
        raise SpaError(f"there is no calibration file {path!r}", fix="give a UTF-8 text file")
    try:
        text = place.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as problem:
        raise SpaError(f"calibration file {path!r} cannot be read as text", why=str(problem),
                       fix="give a UTF-8 text file") from problem
    return from_string(text, tokenizer, origin=path, order=order, **draw)


def from_string(text: str, tokenizer: Tokenizer | None, *, origin: str,
                order: Order | None = None, **draw: Unpack[Draw]) -> Calibration:
    """Return windows of a text held in memory, as `from_text` does."""
    samples, length = draw["samples"], draw["length"]
    if tokenizer is None:
        raise UsageError(f"calibration text {origin!r} needs a tokenizer",
                         why="this model has none",
                         fix="use --calibration none, or pass batches from Python")
    if not text.strip():
        raise SpaError(f"calibration file {origin!r} is empty", fix="give some text")
    found = windows(tokenizer, text, length)
    if not len(found):
        raise SpaError(f"calibration text {origin!r} is shorter than one window of {length} tokens",
                       fix="give more text, or a smaller --length")
    taken = torch.randperm(len(found), generator=torch.Generator().manual_seed(draw["seed"]))
    if order is not None:
        first = order(found)[:samples + draw.get("further", 0)]
        taken = torch.cat([first, taken[~torch.isin(taken, first)]])
    rest = max(0, len(taken) - samples)  # a quarter of a short text's is held out at least
    read = samples + min(draw.get("further", 0), rest - min(HELD_OUT, -(-rest // 4)))
    parts = found[taken].tensor_split([samples, read, read + HELD_OUT])[:3]
    chosen, beside, others = ([((), {"input_ids": rows}) for rows in part.split(draw["batch"])
                               if len(rows)] for part in parts)
    return Calibration(origin, chosen, beside=beside, held_out=others)


SOME = 64  # characters, by which it is seen what a tokenizer puts before a text
HELD_OUT = 8  # windows of a text beside those that are read
PYTHON_TEXT = "pydoc_data.topics (text that Python carries)"
ORIGINS = {"sampled": "sampled from the model itself", "own": "the model's own",
           "python": PYTHON_TEXT, "none": "example inputs only"}
"""What reports call data that is asked for by a word."""


def python_text(part: str = "calibration") -> str:
    """Return English text that every Python has: its language topics.

    `part` is calibration or held-out: every fourth topic is held out.
    """
    from pydoc_data.topics import topics

    held_out = part == "held-out"
    return "\n\n".join(topics[name] for i, name in enumerate(sorted(topics))
                       if (i % 4 == 3) == held_out)


def from_arrays(place: Path, samples: int) -> Calibration:
    """Return batches from .npz files (inputs by name) or .npy files (the one input), or a
    directory of them: a file is a batch.

    Raises SpaError for missing or damaged files; pickled arrays are not read.
    """
    files = sorted(p for p in place.iterdir() if p.suffix in (".npz", ".npy")) \
        if place.is_dir() else [place]
    if not files:
        raise SpaError(f"calibration directory {str(place)!r} holds no .npz or .npy files",
                       fix="save batches of inputs with numpy.savez")
    batches: list[Batch] = []
    for file in files[:samples]:
        try:
            found = np.load(file, allow_pickle=False)
            batches.append(((), {k: torch.from_numpy(found[k]) for k in found.files})
                           if file.suffix == ".npz" else ((torch.from_numpy(found),), {}))
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as problem:
            raise SpaError(f"calibration file {str(file)!r} cannot be read", why=str(problem),
                           fix="save it with numpy.savez or numpy.save") from problem
    return Calibration(f"{len(batches)} batches of {place}", filled(batches))


def filled(batches: list[Batch]) -> list[Batch]:
    """Return batches as they are; raises SpaError for one whose first tensor has no examples."""
    for i, batch in enumerate(batches):
        first = next((x for x in pytree.tree_leaves(batch)
                      if isinstance(x, torch.Tensor) and x.ndim), None)
        if first is not None and not len(first):
            raise SpaError(f"calibration batch {i} has no examples",
                           where=f"a tensor of shape {tuple(first.shape)}", fix="leave it out")
    return batches


