"""The dense network against one with other arrays, or without what a plan removes, by runs alone.

What a passage forward says is the same for a traced module and for a file: only who runs it
differs. Nothing is repaired here, and nothing needs a gradient.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..axes.choices import Choices
from ..axes.expressions import Atom
from ..evidence.calls import Batch, examples, singles, some
from ..evidence.losses import distance, first_floating
from ..groups.repeats import block
from ..groups.solution import Solution
from ..plan.problem import Problem, Unit
from ..system.group import here

Arrays = Mapping[str, torch.Tensor]
Key = frozenset[tuple[Atom, bytes]]
ONE, OTHERS = slice(0, 1), slice(1, None)
ABREAST = 4
"""Plans that one run looks at: more products at a time are quicker, and take memory."""
TELLING = 64
"""Positions of one example that say enough for a glance."""
HELD = 1 << 30
"""Bytes of the dense network's results that are kept for measurements that come again."""
Slopes = dict[str, tuple[float, int, tuple[str, ...]]]
"""By block: its slope, the size of its matrices, and the units in it."""


@dataclass
class Compared(ABC):
    """What is measured by forward passes; `plan(problem, kept)` turns counts into choices."""

    solution: Solution
    batches: Sequence[Batch]
    loss: Callable[..., torch.Tensor]
    plan: Callable[[Problem, Mapping[str, int]], Choices]
    _answers: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False)
    _lost: dict[tuple[Key, int], float] = field(default_factory=dict, init=False)
    _glances: dict[Key, float] = field(default_factory=dict, init=False)

    @abstractmethod
    def results(self, batch: Batch, choices: Choices | None = None,
                arrays: Arrays | None = None) -> list[torch.Tensor]:
        """Return the results of a batch, with what `choices` remove read as zero, and with other
        `arrays` in place of some of the network's own."""

    @abstractmethod
    def stored(self, name: str) -> torch.Tensor:
        """Return a stored array."""

    @abstractmethod
    def called(self, batch: Batch) -> Batch:
        """Return a batch as the network and losses take it."""

    @property
    def divisible(self) -> bool:
        """Whether examples of a batch can be run by themselves."""
        graph = self.solution.graph
        return any(graph.tensors[name].dynamic for name in graph.inputs)

    @torch.no_grad()
    def lost(self, problem: Problem, kept: Mapping[str, int], batches: int,
             skip: int = 0) -> float:
        """Return the divergence from the dense network of one in which what goes reads as zero.

        A mean over the first `batches` of the calibration but for `skip`; nothing is repaired.
        Each plan meets each batch once, whichever allocation asks.
        """
        choices = self.plan(problem, kept)
        asked = range(skip, min(batches, len(self.batches)))
        return sum(self._lost_on(at, choices) for at in asked) / max(len(asked), 1)

    @torch.no_grad()
    def glances(self, problem: Problem, plans: Sequence[Mapping[str, int]]) -> list[float]:
        """Return what `lost` does for each of some counts, on the first example alone.

        `lost` need not run that again. Nan where it says little, or is all of the batch, or cannot
        be run by itself.
        """
        first = self.batches[0]
        held, dense = examples(*first), self._dense(first)
        if held < 2 or len(dense) != held or _positions(dense) < TELLING * held \
                or not self.divisible:
            return [float("nan")] * len(plans)
        made = [self.plan(problem, kept) for kept in plans]
        new = list({_key(choices): choices for choices in made}.items())
        new = [(key, choices) for key, choices in new if key not in self._glances]
        one = some(first, held, ONE)
        for part in (new[at:at + ABREAST] for at in range(0, len(new), ABREAST)):
            for (key, _), found in zip(part, self.abreast(one, [c for _, c in part]), strict=True):
                self._glances[key] = float(distance(found, dense[ONE]))
        return [self._glances[_key(choices)] for choices in made]

    def abreast(self, batch: Batch, plans: Sequence[Choices]) -> list[torch.Tensor]:
        """Return the first results of a batch of one example, without what each plan removes."""
        return [first_floating(self.results(batch, choices)) for choices in plans]

    def _lost_on(self, at: int, choices: Choices) -> float:
        """The divergence on one batch, of which the first example may be known."""
        key, batch = (_key(choices), at), self.batches[at]
        if key not in self._lost:
            seen, dense = self._glances.get(key[0]) if at == 0 else None, self._dense(batch)
            if seen is None:
                self._lost[key] = self._apart_on(batch, choices, dense)
            else:
                rest = some(batch, len(dense), OTHERS)
                found = self._apart_on(rest, choices, dense[OTHERS])
                self._lost[key] = (seen + found * (len(dense) - 1)) / len(dense)
        return self._lost[key]

    def _apart_on(self, batch: Batch, choices: Choices, dense: torch.Tensor) -> float:
        return float(distance(first_floating(self.results(batch, choices)), dense))

    def diverges(self, problem: Problem, kept: Mapping[str, int], batches: int,
                 skip: int = 0) -> float:
        """Return what `lost` does: nothing is repaired here."""
        return self.lost(problem, kept, batches, skip)

    @torch.no_grad()
    def few(self, most: int, positions: int) -> int:
        """Return how many batches hold so many positions (examples, or tokens), or `most`."""
        held = _positions(self._dense(self.batches[0]))
        return min(most, len(self.batches), -(-positions // max(1, held)))

    @torch.no_grad()
    def fidelity(self, problem: Problem, kept: Mapping[str, int],
                 batches: int) -> tuple[float, float, int]:
        """Return how often the likeliest class is the dense network's (a share of rows), the
        divergence from it, and how many rows, of the network without what goes, repaired if a
        repair is to follow.

        Means over the first `batches`. Of one number a row there is but one class.
        """
        choices = self.plan(problem, kept)
        arrays, some = self.repaired(problem, choices), self.batches[:batches]
        same, apart, rows = 0.0, 0.0, 0
        for batch in some:
            pruned, dense = first_floating(self.results(batch, choices, arrays)), self._dense(batch)
            classes = 1 if dense.ndim == 4 else -1
            same += float((pruned.argmax(classes) == dense.argmax(classes)).double().mean())
            apart += float(distance(pruned, dense))
            rows += dense.numel() // max(dense.shape[classes], 1)
        return same / max(len(some), 1), apart / max(len(some), 1), rows

    def repaired(self, problem: Problem, choices: Choices) -> Arrays:
        """Return the arrays that a repair would put in place of the network's own: none here."""
        del problem, choices
        return {}

    @torch.no_grad()
    def distortion(self, problem: Problem, kept: Mapping[str, int], batches: int) -> float:
        """Return E ||f(x) - f_kept(x)||^2 of the first results, over the first `batches`: a sum
        over an example's results, a mean over examples."""
        def squared(pruned: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            return (pruned - dense).double().square().sum() / max(len(dense), 1)

        return self._apart(problem, kept, self.batches[:batches], squared)

    def _apart(self, problem: Problem, kept: Mapping[str, int], batches: Sequence[Batch],
               how: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        choices = self.plan(problem, kept)

        def distant(batch: Batch) -> float:
            return float(how(first_floating(self.results(batch, choices)), self._dense(batch)))

        return sum(here().each(batches, distant, "a trial")) / max(len(batches), 1)

    def _dense(self, batch: Batch) -> torch.Tensor:
        """The dense network's first result, computed once while there is room for it."""
        key = id(batch[0]), id(batch[1])
        found = self._answers.get(key)
        if found is None:
            found = first_floating(self.results(batch))
            held = sum(x.numel() * x.element_size() for x in self._answers.values())
            if held + found.numel() * found.element_size() <= HELD:
                self._answers[key] = found
        return found

    @torch.no_grad()
    def slopes(self, problem: Problem, *, step: float, examples: int, seed: int = 0) -> Slopes:
        """Return, by block, the sum over its matrices W and over the first `examples` of
        |L(W + step z) - L(W - step z)| / (2 step), z normal and drawn anew each time.

        A unit in no repeated block is one by itself, with the matrices of its groups.
        """
        some = list(self._some(examples))
        found: Slopes = {}
        for path, units in self._by_block(problem.units).items():
            names, total = self._matrices(path, units), 0.0
            for name in names:
                draws = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
                total += sum(self._slope(name, batch, step, draws) for batch in some)
            size = sum(self.stored(name).numel() for name in names)
            found[path] = total, size, tuple(u.name for u in units)
        return found

    def _slope(self, name: str, batch: Batch, step: float, draws: torch.Generator) -> float:
        held = self.stored(name)
        noise = torch.randn(held.shape, generator=draws).to(held.dtype)
        ends = [self.loss(self.results(batch, arrays={name: held + sign * step * noise}),
                          *self.called(batch)) for sign in (1, -1)]
        return abs(float(ends[0]) - float(ends[1])) / (2 * step)

    def _some(self, count: int) -> Iterator[Batch]:
        """The first examples, one by one where the network takes them so, else by the batch."""
        left = count
        for batch in self.batches:
            if left <= 0:
                return
            held = examples(*batch)
            if not self.divisible:
                yield batch
            else:
                yield from list(singles(batch, held))[:left]
            left -= held

    @staticmethod
    def _by_block(units: Sequence[Unit]) -> dict[str, list[Unit]]:
        found: dict[str, list[Unit]] = {}
        for unit in units:
            found.setdefault(block(unit.groups[0].name) or unit.name, []).append(unit)
        return found

    def _matrices(self, path: str, units: Sequence[Unit]) -> list[str]:
        """Arrays of a block with two dimensions or more, each once; else those of its groups."""
        held = self.solution.graph.weights()
        own = {m.weight for u in units for g in u.groups for m in g.members}
        inside = [name for name in held if name.startswith(f"{path}.")] or sorted(own)
        return [name for name in inside if len(held[name].shape) > 1
                and held[name].kind == "parameter"]


def _key(choices: Choices) -> Key:
    """What tells choices apart."""
    return frozenset((atom, choice.table.tobytes()) for atom, choice in choices.items())


def _positions(result: torch.Tensor) -> int:
    """How many predictions a result holds: tokens, examples, or places of a map."""
    return result.numel() // max(1, result.shape[1 if result.ndim == 4 else -1])
