"""See what places of a file read, while ONNX Runtime computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from math import prod
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from ...errors import UsageError
from ...evidence.consumers import Consumer
from ...evidence.scores import Scores
from ...evidence.statistics import View, forward_only
from ...groups.solution import Group
from ...process import no_warnings
from ...request.registry import available
from ..read.file import checked_feed, release
from ..read.lower import OnnxTrace
from .session import Session, alone, run

EXPOSED = 2**28
"""Bytes of tensors (and of their statistics) that one run returns: more would be held at once."""


class FileScores(Scores):
    """The context that importance passes see: a file's arrays, and what ONNX Runtime computes."""

    _mapped: tuple[str, ...] = ()
    _made: Mapping[str | None, ir.Value] = MappingProxyType({})

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array as it lies; integers (quantised weights) as floats."""
        model = cast(Any, self.trace).model
        self._mapped = (*(n for n in self._mapped if not release(model, n)), name)
        found = _tensor(cast(Any, self.trace).stored(name))
        return found if found.is_floating_point() else found.float()

    def calibrate(self, needs: Iterable[str], batches: Iterable[Any], loss: Any, *,
                  groups: Sequence[Group], tick: Callable[[], None] = lambda: None) -> None:
        """Run the file on batches, exposing what consumers read, a few tensors at a time.

        Raises UsageError for a statistic of gradients.
        """
        watched, feeds = self._ready(needs, batches, groups)
        for _ in self._runs(watched, feeds):
            pass
        for _ in feeds:
            tick()

    def stream(self, needs: Iterable[str], batches: Iterable[Any],
               groups: Sequence[Group]) -> Iterator[Group]:
        """Gather statistics of inputs and yield each group when its own are complete.

        What no later group needs is dropped after each run over the batches.
        """
        watched, feeds = self._ready(needs, batches, groups)
        waiting = {g.name: {c.key for c in self._consumers_of(g)} for g in groups}
        done: set[str] = set()
        for names in self._runs(watched, feeds):
            done |= {at.key for (_, name), own in watched.items() if name in names for at in own}
            yield from self._complete(waiting, done, groups)
        yield from (g for g in groups if not self._consumers_of(g))

    def _ready(self, needs: Iterable[str], batches: Iterable[Any], groups: Sequence[Group],
               ) -> tuple[dict[tuple[str, str], list[Consumer]], list[dict[str, np.ndarray]]]:
        wanted = set(needs)
        if not forward_only(wanted):
            names = [e.name for k, e in available() if k == "importance" and _is_forward(e)]
            raise UsageError(
                f"an ONNX file has no gradients: {', '.join(sorted(wanted))} cannot be gathered",
                why="ONNX Runtime computes forward only",
                fix=f"use --importance with one that needs none: {', '.join(sorted(names))}")
        return self._watch(wanted, groups), [_feed(cast(Any, self.trace), b) for b in batches]

    def _runs(self, watched: dict[tuple[str, str], list[Consumer]],
              feeds: list[dict[str, np.ndarray]]) -> Iterator[list[str]]:
        """Run over all batches with as many tensors exposed as fit, yield their names, and so on.
        """
        grow = max((_elements(feed) for feed in feeds), default=1) / \
            max(_elements(cast(Any, self.trace).feeds), 1)
        held, total = list[str](), 0.0
        for name, cost in (*self._costs(watched, max(grow, 1.0)).items(), ("", EXPOSED)):
            total += cost
            if held and total > EXPOSED:
                self._expose(held, watched, feeds)
                yield held
                held, total = [], cost
            held.append(name)

    def _costs(self, watched: dict[tuple[str, str], list[Consumer]],
               grow: float) -> dict[str, float]:
        """Bytes of each watched tensor, `grow` times the traced one, and of its covariances."""
        tensors, found = self.solution.graph.tensors, dict[str, float]()
        for (_, name), own in watched.items():
            if name not in found:
                found[name] = 4.0 * prod(tensors[name].shape) * grow
            if any("covariance" in self._inputs.get(at.key, {}) for at in own):
                found[name] += sum(8.0 * _features(tensors[at.weight].shape) ** 2 for at in own)
        return found

    def _expose(self, names: list[str], watched: dict[tuple[str, str], list[Consumer]],
                feeds: Iterable[dict[str, np.ndarray]]) -> None:
        session = Session(cast(Any, self.trace).model, names)
        for feed in feeds:
            count = next((len(a) for a in feed.values() if a.ndim), 1)
            values = dict(zip(names, session.run(feed, names), strict=True))
            for node, name in watched:
                if name in values:
                    self._see(watched, {}, node, name, torch.from_numpy(values[name]), count)

    def _view(self, at: Consumer, group: Group) -> View:
        tensor = self.solution.graph.tensors[at.weight]
        array = self.stored(tensor.weight) if tensor.weight is not None else \
            _tensor(self._computed(at.weight))
        return View(at, at.matrix(array), self._feature_slots(at, group), group.shape,
                    self._inputs.get(at.key, {}), lambda kind: torch.zeros(()))

    def _computed(self, name: str) -> np.ndarray:
        """Return what follows from stored arrays alone (a transposed weight)."""
        model = cast(Any, self.trace).model
        if not self._made:
            self._made = {o.name: o for node in model.graph for o in node.outputs}
        return run(alone(model, self._made[name]), {}, [name])[name]


def _elements(feed: dict[str, np.ndarray]) -> int:
    return sum(array.size for array in feed.values())


def _features(shape: tuple[int, ...]) -> int:
    """No consumer with a weight of this shape reads more features at once."""
    return max(prod(shape[1:]), shape[0] if shape else 1)


def _is_forward(entry: EntryPoint) -> bool:
    """True for an installed criterion that needs no gradients."""
    try:
        return forward_only(entry.load()().needs)
    except (ImportError, AttributeError, TypeError):
        return False


def _feed(traced: OnnxTrace, batch: Any) -> dict[str, np.ndarray]:
    """Return a batch of (args, kwargs) as the file's inputs; an empty one is the example."""
    args, kwargs = batch
    names = [v.name or "" for v in traced.file.inputs()]
    given = dict(zip(names, args, strict=False)) | kwargs
    return checked_feed(traced.file, given) if given else traced.feeds


def _tensor(array: np.ndarray) -> torch.Tensor:
    if not array.flags.writeable or array.dtype.name in ("bfloat16",):
        array = array.astype(np.float32) if array.dtype.name == "bfloat16" else array
    with no_warnings():  # torch cannot know that nobody writes
        return torch.from_numpy(array)
