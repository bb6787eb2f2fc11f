"""See what places of a file read, while ONNX Runtime computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir
import torch

from ...axes.choices import Choices
from ...evidence.calls import Batch
from ...evidence.network import Place, See, Stored
from ...evidence.scores import Scores
from ...groups.solution import Solution
from ...rows.onnx_integers import zero_point
from ...system.process import no_warnings
from ..read.file import checked_feed
from ..read.stored import release
from ..read.trace import OnnxTrace
from .lockstep import FileLockstep
from .session import Session, alone, hidden, run

EXPOSED = 2**28
"""Bytes of tensors (and of their statistics) that one run returns: more would be held at once."""


def fresh_context(trace: OnnxTrace, solution: Solution, seed: int = 0) -> Scores:
    """Return a context for importance passes that nothing has been gathered in yet."""
    return Scores(FileNetwork(trace), solution, seed)


@dataclass
class FileNetwork:
    """A file as a network that evidence is drawn from, and that can be repaired.

    ONNX Runtime returns what is asked for, from the file's own arrays.
    """

    trace: OnnxTrace
    _mapped: tuple[str, ...] = ()
    _made: dict[str | None, ir.Value] = field(default_factory=dict)

    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array as it lies; integers (quantised weights) as floats from their
        zero point on."""
        model = self.trace.model
        self._mapped = (*(n for n in self._mapped if not release(model, n)), name)
        found = _tensor(self.trace.stored(name))
        return found if found.is_floating_point() else found.float() - _zero(model, name)

    def static(self, name: str, stored: Stored) -> torch.Tensor:
        """Return a stored array, or what follows from the file's own alone (a transposed weight).
        """
        weight = self.trace.graph.tensors[name].weight
        if weight is not None:
            return stored(weight)
        model = self.trace.model
        if not self._made:
            self._made.update((o.name, o) for node in model.graph for o in node.outputs)
        return _tensor(run(alone(model, self._made[name]), {}, [name])[name])

    def observe(self, batches: Iterable[Batch], places: Mapping[Place, float], see: See, *,
                together: bool = False, tick: Callable[[], None] = lambda: None,
                shown: Callable[[], None] = lambda: None) -> Iterator[set[Place]]:
        """Run over all batches with as many tensors exposed as fit, yield places, and so on.

        Raises SpaError for what is read of a branch's own values.
        """
        feeds = [feed_of(self.trace, batch) for batch in batches]
        readers: dict[str, list[Place]] = {}
        for place in places:
            readers.setdefault(place[1], []).append(place)
        self._check_outside(readers)
        for names in _fitting(self._costs(places, feeds)):
            for _ in self._expose(names, readers, feeds, see):
                shown()
            yield {place for name in names for place in readers[name]}
        for _ in feeds if not together else ():
            tick()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Let the trace have another value of a stored array; the file keeps its own."""
        self.trace.repaired[name] = self.trace.array(name, value.numpy())

    def lockstep(self, solution: Solution, choices: Choices,
                 batches: Sequence[Batch]) -> FileLockstep:
        """Run all batches from place to place, what `choices` remove read as zero."""
        return FileLockstep(self.trace, solution, choices,
                            [feed_of(self.trace, batch) for batch in batches])

    def _check_outside(self, readers: Mapping[str, list[Place]]) -> None:
        graph = self.trace.model.graph
        known = {v.name for v in graph.inputs} | {o.name for node in graph for o in node.outputs}
        inside = next((name for name in readers if name not in known), None)
        if inside is not None:
            raise hidden(inside)

    def _costs(self, places: Mapping[Place, float],
               feeds: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Bytes of each tensor that is read there, at the sizes of batches, and of its statistics.
        """
        grow = max((_elements(feed) for feed in feeds), default=1) / \
            max(_elements(self.trace.feeds), 1)
        found: dict[str, float] = {}
        for (_, name), size in places.items():
            if name not in found:
                found[name] = 4.0 * prod(self.trace.graph.tensors[name].shape) * max(grow, 1.0)
            found[name] += size
        return found

    def _expose(self, names: list[str], readers: Mapping[str, list[Place]],
                feeds: Iterable[dict[str, np.ndarray]], see: See) -> Iterator[int]:
        """Show what is read of some tensors, yielding the number of each batch that is done."""
        session = Session(self.trace.model, names)
        for number, feed in enumerate(feeds):
            count = next((len(a) for a in feed.values() if a.ndim), 1)
            values = session.run(feed, names)
            for name, value in zip(names, values, strict=True):
                for node, _ in readers[name]:
                    see(number, node, name, torch.from_numpy(value), count)
            yield number


def _fitting(costs: Mapping[str, float]) -> Iterator[list[str]]:
    """Yield names in order, as many at once as cost no more than `EXPOSED` (at least one)."""
    held, total = list[str](), 0.0
    for name, cost in costs.items():
        if held and total + cost > EXPOSED:
            yield held
            held, total = [], 0.0
        held.append(name)
        total += cost
    if held:
        yield held


def _zero(model: ir.Model, name: str) -> torch.Tensor:
    """The zero point of stored integers."""
    value = model.graph.initializers.get(name)
    for node, i in value.uses() if value is not None else ():
        at = zero_point(node.op_type, i)
        zero = node.inputs[at] if at is not None and at < len(node.inputs) else None
        if zero is not None and zero.const_value is not None and zero.const_value.size == 1:
            return torch.tensor(float(zero.const_value.numpy().reshape(())))
    return torch.zeros(())


def _elements(feed: dict[str, np.ndarray]) -> int:
    return sum(array.size for array in feed.values())


def feed_of(traced: OnnxTrace, batch: Batch) -> dict[str, np.ndarray]:
    """Return a batch of (args, kwargs) as the file's inputs; an empty one is the example."""
    args, kwargs = batch
    names = [v.name or "" for v in traced.file.inputs()]
    given = dict(zip(names, args, strict=False)) | kwargs
    return checked_feed(traced.file, given) if given else traced.feeds


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    with no_warnings():  # torch cannot know that nobody writes
        return torch.from_numpy(array)
