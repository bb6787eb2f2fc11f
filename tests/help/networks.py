"""Small random networks, written as text: one line names one value.

    a = conv(x, out=6, kernel=3, groups=1)
    b = batch_norm(a)
    c = add(a, b)

The words are functions in words.py. Values that no later line reads go through a linear layer
each, so that their axes may shrink. A drawn network is a list of numbers, one for each line: the
seed of what is drawn there. So it shrinks by losing lines.
"""

from __future__ import annotations

import ast
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from words import OFTEN, WIDTHS, WORDS, Dice


@dataclass(frozen=True)
class Line:
    """`name = word(values, options)`; `like` names an earlier line whose arrays it shares."""

    name: str
    word: str
    values: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [*self.values, *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"{self.name} = {self.word}({', '.join(given)})"


def parse(text: str) -> list[Line]:
    """Read lines back; the shape of the input stands in front: `x: 2x6x4x4`."""
    made = []
    for statement in ast.parse(text).body:
        assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call)
        call = statement.value
        made.append(Line(statement.targets[0].id, call.func.id,  # type: ignore[attr-defined]
                         tuple(a.id for a in call.args),  # type: ignore[attr-defined]
                         {k.arg: ast.literal_eval(k.value) for k in call.keywords}))
    return made


class Net(nn.Module):
    """The network that lines describe; `shape` is the input's."""

    def __init__(self, shape: Sequence[int], lines: Sequence[Line]) -> None:
        super().__init__()
        self.shape, self.lines = tuple(shape), list(lines)
        self._owner, self._count = "", 0
        with torch.no_grad():
            self(self.example())

    def example(self) -> Tensor:
        return values_for("x", self.shape)

    def array(self, *shape: int, positive: bool = False,
              index: Sequence[int] | None = None) -> Tensor:
        """The next array of the line: made when first asked for, shared with a line alike."""
        name = f"{self._owner}_{self._count}"
        self._count += 1
        if not hasattr(self, name):
            made = values_for(name, shape)
            if index is not None or positive:
                self.register_buffer(
                    name, made.abs() + 0.5 if index is None else torch.tensor(index))
            else:
                self.register_parameter(name, nn.Parameter(made))
        found = getattr(self, name)
        if found.shape != shape and index is None:
            raise ValueError(f"{name} has the shape {tuple(found.shape)}, not {shape}")
        return found

    def forget(self, owner: str) -> None:
        """Drop the arrays of a line."""
        for name in [n for n in (*self._parameters, *self._buffers) if n.startswith(f"{owner}_")]:
            delattr(self, name)

    def step(self, line: Line, known: dict[str, Tensor]) -> Tensor:
        """Compute the value of a line."""
        options = dict(line.options)
        self._owner, self._count = options.pop("like", line.name), 0
        return WORDS[line.word].run(self, *(known[v] for v in line.values), **options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        known = {"x": x}
        for line in self.lines:
            known[line.name] = self.step(line, known)
        used = {v for line in self.lines for v in line.values}
        made = []
        for name in [line.name for line in self.lines if line.name not in used]:
            self._owner, self._count = f"{name}_out", 0
            made.append(WORDS["linear"].run(self, known[name].flatten(1), 3))
        return tuple(made) if made else (x + 1,)

    def __str__(self) -> str:
        return "\n".join([f"x: {'x'.join(map(str, self.shape))}", *map(str, self.lines)])


def network(text: str) -> Net:
    """Read a whole network from text."""
    head, _, body = text.strip().partition("\n")
    shape = [int(size) for size in head.removeprefix("x:").strip().split("x")]
    return Net(shape, parse("\n".join(row.strip() for row in body.splitlines())))


def values_for(name: str, shape: Sequence[int]) -> Tensor:
    """Normal numbers that depend on a name, in double precision."""
    seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(tuple(shape), generator=seeded, dtype=torch.float64)


# --- drawing networks ---------------------------------------------------------------------------

MOST = 600  # elements of a value
TRIES = 6
SHAPES = ((2, 8), (2, 4, 6), (2, 3, 6), (2, 5, 8), (2, 4, 4), (2, 6, 4, 4),
          (2, 4, 3, 5), (2, 2, 4, 4, 4))


def networks(most: int = 9, words: Sequence[str] = OFTEN,
             shapes: Sequence[tuple[int, ...]] = SHAPES,
             widths: Sequence[int] = WIDTHS) -> st.SearchStrategy[Net]:
    """Networks of so many lines or fewer, with layers of these widths."""
    seeds = st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=most)
    return st.builds(partial(drawn, words=words, widths=widths), st.sampled_from(shapes), seeds)


def drawn(shape: tuple[int, ...], seeds: Sequence[int], words: Sequence[str] = OFTEN,
          widths: Sequence[int] = WIDTHS) -> Net:
    """Draw a network: one line for each seed, if one is found that fits."""
    net = Net(shape, [])
    known = {"x": net.example()}
    for rng in map(Dice, seeds):
        rng.widths = widths
        for _ in range(TRIES):
            line = _line(rng, net, known, rng.choice(words if net.lines else ("linear", "conv")))
            if line is not None and _add(net, line, known):
                break
    return Net(shape, net.lines)


def _add(net: Net, line: Line, known: dict[str, Tensor]) -> bool:
    """Take a line into a network unless it fails or grows too large."""
    try:
        value = net.step(line, known)
        if 0 < value.numel() <= MOST and value.ndim <= 6 and value.shape[0] == net.shape[0]:
            known[line.name] = value
            net.lines.append(line)
            return True
    except (RuntimeError, ValueError, IndexError):
        pass  # arrays to share that do not fit, or nothing left
    net.forget(line.name)
    return False


def _line(rng: Dice, net: Net, known: dict[str, Tensor], name: str) -> Line | None:
    recent = list(known)[::-1]
    picked = [rng.choice(recent)]
    if WORDS[name].reads == 2:
        shape = known[picked[0]].shape
        alike = [v for v in recent if known[v].ndim == len(shape) and v != picked[0]]
        alike.sort(key=lambda v: -sum(map(int.__eq__, known[v].shape, shape)))
        picked.append(rng.choice(alike or recent))
    options = WORDS[name].fit(rng, *(known[v] for v in picked))
    if options is None:
        return None
    twins = [line for line in net.lines if line.word == name and hasattr(net, f"{line.name}_0")]
    if twins and rng.random() < 0.25:
        twin = rng.choice(twins)
        options = {**{k: v for k, v in twin.options.items() if k != "like"},
                   "like": twin.options.get("like", twin.name)}
    return Line("abcdefghijklmnopqrstuvwyz"[len(net.lines)], name, tuple(picked), options)
