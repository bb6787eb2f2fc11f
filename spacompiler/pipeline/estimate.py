"""What a compile will need, from shapes alone, against what there is: before any work is done.

Bounds are what the largest stage cannot do without; what is refused would fail. A module in memory
is there already, and arrays in files can be let go: neither counts. Nothing is known yet of the
network's graph, so layers are taken as they stand and every one is taken to be calibrated.
"""

from __future__ import annotations

import fnmatch
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import nn

from ..errors import SpaError
from ..evidence.calls import amount
from ..evidence.room import LIMIT
from ..evidence.statistics import forward_only
from ..request.low_rank import parse_low_rank
from ..request.targets import parse_targets
from ..stages.records import Request, Subject
from ..store.room import is_large
from ..system import available

SURE = 0.8
"""Share of an estimate that must be there: what is refused is not a matter of rounding."""
SMALL = 100e6
"""Bytes of memory and disk below which there is nothing to say."""
GGUF = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07, "q5_1": 0.75, "q5_0": 0.69,
        "q4_1": 0.63, "q4_0": 0.57}
"""Bytes a weight in a GGUF file."""


@dataclass(frozen=True)
class Job:
    """What a compile's needs follow from: sizes in bytes, layers as (outputs, features).

    `share` is what stays, `tokens` are rows of a batch and of all; `held` says that covariances of
    all layers are held at once, `repairs` that layers are solved. `products` are those that are to
    become products of two.
    """

    dense: int
    values: int
    share: float
    layers: tuple[tuple[int, int], ...] = ()
    products: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, int] = (0, 0)
    backward: bool = False
    covariance: bool = False
    held: bool = False
    repairs: bool = False
    trains: bool = False
    large: bool = False
    onnx: bool = False
    latency: bool = False
    int8: bool = False
    gguf: str = ""
    writes: bool = True

    @property
    def made(self) -> float:
        """Bytes of the result's weights."""
        return self.share * self.dense

    def _covariances(self) -> list[float]:
        return sorted((8.0 * features**2 for _, features in self.layers), reverse=True)

    def memory(self) -> float:
        """Bytes that are needed at once beside what is in memory now."""
        widest = max((out for out, _ in self.layers), default=0)
        looking = 4.0 * self.tokens[0] * widest * (3 if self.backward else 1)
        sums = self._covariances() if self.covariance or self.repairs else []
        sums_held = min(sum(sums), LIMIT) if self.held else sum(sums[:1])
        solving = 2 * sums[0] if self.repairs and sums else 0.0
        making = 0.0 if self.large and not self.trains else self.made
        exporting = self.made * self.onnx + (self.dense if self.latency and self.onnx else 0)
        training = 4.0 * self.share * self.values * self.trains
        return max(looking + sums_held, sums_held + solving, making + exporting, making + training,
                   looking + self._met(), self._spectra())

    def _met(self) -> float:
        """Bytes of what layers that become products read: x x' in float32, of all at once."""
        return sum(4.0 * features**2 for _, features in self.products) * bool(self.tokens[1])

    def _spectra(self) -> float:
        """Bytes of the weights and directions of these layers, in float64."""
        return sum(8.0 * out * (features + min(out, features)) for out, features in self.products)

    def disk(self) -> float:
        """Bytes that are needed beside the output."""
        if not self.writes:
            return 0.0
        files = 1 + self.onnx + (1 if self.large and not self.trains else 0)
        return self.made * files + self.share * self.values * (
            self.int8 + GGUF.get(self.gguf, 0.0))

    def scratch(self) -> float:
        """Bytes that are needed for files that nobody sees."""
        sums = sum(self._covariances()) if self.held and self.covariance else 0.0
        return max(sums - LIMIT, self.dense if self.latency and self.onnx else 0.0, 0.0)

    def operations(self) -> float:
        """Multiplications and additions of calibration and least squares."""
        run = 2.0 * sum(out * features for out, features in self.layers) * self.tokens[1]
        sums = sum(2.0 * f**2 * self.tokens[1] for _, f in self.layers) \
            if self.covariance or self.repairs else 0.0
        solved = sum(4 * f**3 / 3 + 2.0 * f**2 * out for out, f in self.layers) * self.repairs
        return run * (3 if self.backward else 1) * bool(self.tokens[1]) + sums + solved


def job(ask: Request, subject: Subject, *, writes: bool) -> Job:
    """Return what a compile's needs follow from."""
    recipe, model = ask.recipe, subject.model
    needs, measured = set(ask.importance.needs), ask.allocation.name == "measured"
    common = Job(0, 0, _share(recipe.target), writes=writes, onnx=recipe.onnx,
                 latency=recipe.latency, int8=recipe.int8, gguf=recipe.gguf)
    if not isinstance(model, nn.Module):
        files = [model.path, *model.data]
        return replace(common, dense=sum(p.stat().st_size for p in files if p.exists()), onnx=False)
    arrays = list(model.parameters())
    looks = bool(needs) or ask.compensation is not None or bool(recipe.low_rank)
    return replace(
        common, dense=sum(p.nbytes for p in arrays), values=sum(p.numel() for p in arrays),
        layers=tuple((len(p), prod(p.shape[1:])) for p in _layers(model)),
        products=tuple(_named(model, [p for p, _ in map(parse_low_rank, recipe.low_rank)])),
        tokens=_tokens(ask) if looks else (0, 0), backward=not forward_only(needs),
        covariance="covariance" in needs or measured, held="curvature" in needs or measured,
        repairs=ask.compensation is not None and getattr(ask.compensation, "weights", True),
        trains=ask.recovery is not None or ask.schedule is not None, large=is_large(model))


def _layers(model: nn.Module) -> Iterator[torch.Tensor]:
    """Weights of linear layers and convolutions, each once."""
    seen = {id(m.weight): m.weight for m in model.modules()
            if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and m.weight is not None}
    yield from seen.values()


def _named(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Sizes (outputs, features) of the linear layers that any of some patterns names."""
    for path, part in model.named_modules():
        if type(part) is nn.Linear and any(fnmatch.fnmatchcase(path, p) for p in patterns):
            yield part.out_features, part.in_features


def _share(target: str) -> float:
    """What stays of the bytes, by the target: half of it where it counts something else."""
    found = [t.amount * (1.0 if t.metric in ("params", "bytes", "body") else 0.5)
             for t in parse_targets(target) if not t.absolute]
    return min(1.0, *found) if found else 0.0


def _tokens(ask: Request) -> tuple[int, int]:
    """Tokens (or examples) of the largest batch and of all."""
    found = [*map(amount, ask.calibration.for_repair)] or [0]
    return max(found), sum(found)


# --- what there is --------------------------------------------------------------------------------


def check(ask: Request, subject: Subject, out: Path | None) -> str:
    """Return one line on what a compile needs and what there is, "" where it is a small one.

    Raises SpaError, with the options that would fit, where something is too little.
    """
    wanted = job(ask, subject, writes=out is not None)
    free = available.memory(), available.disk(out or Path.cwd()), \
        available.disk(Path(tempfile.gettempdir()))
    missing = _missing(wanted, free)
    if missing:
        fits = [words for words, other in _others(wanted) if not _missing(other, free)]
        raise SpaError("this compile needs more than there is", where=ask.name,
                       why="; ".join(missing),
                       fix=f"this would fit: {', or '.join(fits[:3])}" if fits else
                       "a larger machine, or another place for --out and TMPDIR")
    if max(wanted.memory(), wanted.disk()) < SMALL:
        return ""
    there = ["" if have is None else f" (of {_size(have)})" for have in free]
    return (f"needs about {_size(wanted.memory())} of memory{there[0]}"
            + (f", {_size(wanted.disk())} of disk{there[1]}" if wanted.writes else "")
            + f", {wanted.operations():.0e} operations to look at data and repair")


def _missing(wanted: Job, free: Sequence[int | None]) -> list[str]:
    rows = (("memory", wanted.memory(), free[0]), ("disk at --out", wanted.disk(), free[1]),
            ("disk for temporary files", wanted.scratch(), free[2]))
    return [f"{what}: about {_size(need)} are needed, {_size(have)} are there"
            for what, need, have in rows if have is not None and SURE * need > have]


def _others(wanted: Job) -> Iterator[tuple[str, Job]]:
    """Yield other requests that need less, in words."""
    blind = replace(wanted, backward=False, covariance=False, held=False, repairs=False,
                    tokens=(0, 0))
    if wanted.tokens[0]:
        yield "--batch 1", replace(wanted, tokens=(max(
            1, wanted.tokens[0] // 2), wanted.tokens[1]))
    if wanted.latency and wanted.onnx:
        yield "--no-latency", replace(wanted, latency=False)
    if wanted.onnx:
        yield "--no-onnx", _unexported(wanted)
    if wanted.held:
        yield "--importance taylor --allocation uniform", replace(
            wanted, covariance=False, held=False)
    if wanted.products:
        yield "no --low-rank", replace(wanted, products=())
    if wanted.tokens[0]:
        yield "--importance magnitude --repair none", blind
    if wanted.trains:
        yield "no --recover", replace(wanted, trains=False)
    yield "--importance magnitude --repair none --no-onnx, and no --recover" + (
        " or --low-rank" if wanted.products else ""), replace(
            _unexported(blind), trains=False, products=())


def _unexported(wanted: Job) -> Job:
    return replace(wanted, onnx=False, latency=False, int8=False)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
