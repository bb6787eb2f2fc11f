"""Run an exported program node by node: with masks, with gates, in float64.

One interpreter serves calibration (gates on what consumers read), the proof (masks there) and
evaluation, so that all three speak of the same places in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.node import Argument, Target
from torch.utils import _pytree as pytree

from ...evidence.where import FLOATS, HERE, Where
from ...store.mapped import let_go
from ...system.heap import give_back
from ..trace import Program
from .held import IN_PARTS, LARGE, Held
from .recompute import Budget, Segment, borders, recomputed, segments

Weights = Callable[[str], torch.Tensor]
Touch = Callable[[fx.Node, str, torch.Tensor], torch.Tensor]
Override = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Reads:
    """What is done to what nodes read: `touch(node, name, value)` returns what is read instead.

    `places` are, by node, the tensors whose values are offered.
    """

    places: Mapping[str, Collection[str]] = field(default_factory=dict)
    touch: Touch | None = None

    def of(self, node: fx.Node, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return what a node reads of a tensor that has a value."""
        if self.touch is None or name not in self.places.get(node.name, ()):
            return value
        return self.touch(node, name, value)


class Runner(fx.Interpreter):
    """Interpret a program.

    `reads` may change what nodes read, `override` replaces single nodes. It runs at `where`, in the
    type of that, whatever the program says: what is stored or given is moved as it is read.
    `weights` gives a stored array by its name: it is asked each time that a node reads one, and
    what is not read is not held. With `held`, no more is held for the backward pass; the rest is
    computed again (see `recompute`), `again` set meanwhile.
    """

    def __init__(self, program: Program, weights: Weights | None = None, *,
                 graph_module: fx.GraphModule | None = None,
                 reads: Reads | None = None, override: Mapping[str, Override] | None = None,
                 where: Where = HERE,
                 watch: Callable[[str, Any], None] | None = None,
                 held: Budget | None = None) -> None:
        super().__init__(graph_module or program.graph_module, garbage_collect_values=True)
        self.extra_traceback = False
        stored = {**program.state_dict, **program.constants}
        self._weights = weights or (lambda name: stored[name])
        self._program, self._reads = program, reads or Reads()
        self._override, self._where, self._watch = override or {}, where, watch
        self._double = where.dtype == torch.float64
        self._widen = _double if self._double else \
            partial(widened, where.dtype) if where.dtype else None
        self._held, self.again = held, False
        self._fetched: list[torch.Tensor] = []

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the flat list of results of one call; what it writes back is none."""
        results = list(self.run(*self._values(args, kwargs))) if self._held is None else \
            self._in_segments(args, kwargs, self._held)
        return self.asked(results)

    def asked(self, results: list[Any]) -> list[Any]:
        """Return those of a call's results that are not written back."""
        count = sum(spec.kind.name == "USER_OUTPUT"
                    for spec in self._program.graph_signature.output_specs)
        return results[len(results) - count:]

    def holding(self, names: Collection[str]) -> set[fx.Node]:
        """Return the inputs of the graph that hold stored arrays of these names."""
        specs = self._program.graph_signature.input_specs
        return {node for node, spec in zip(self.graph.find_nodes(op="placeholder"), specs,
                                           strict=True) if spec.target in names}

    def _in_segments(self, args: tuple[Any, ...], kwargs: dict[str, Any],
                     held: Budget) -> list[Any]:
        """Run one call, all but its end in segments that are run again in backward."""
        self.start(args, kwargs)
        parts = segments(self.graph)
        for node in self.graph.find_nodes(op="placeholder"):
            self.step(node)
        end = max(0, len(parts) - held.last(len(parts)))
        for part in parts[:end]:
            self._segment(part, held)
        if end:  # else the next call has use for what this one leaves
            give_back()
        for node in (node for part in parts[end:] for node in part):
            self.step(node)
        (output,) = self.graph.find_nodes(op="output")
        results = list(self.run_node(output))
        self.env = {}  # they are the caller's to hold
        return results

    def _segment(self, part: Segment, held: Budget) -> None:
        entering, leaving = borders(part)

        def run(*values: object) -> list[Any]:
            outer, self.env = self.env, dict(zip(entering, values, strict=True))
            try:
                for node in part:
                    self.step(node)
                return [self.env[node] for node in leaving]
            finally:
                self.env = outer

        made = recomputed(run, *(self.env[node] for node in entering), held=held,
                          again=self._mark)
        self.env.update(zip(leaving, made, strict=True))
        for done in (d for node in part for d in self.user_to_last_uses.get(node, [])):
            self.env.pop(done, None)

    def _mark(self, again: bool) -> None:
        self.again = again

    def steps(self, args: tuple[Any, ...], kwargs: dict[str, Any],
              stops: set[str]) -> Iterator[str]:
        """Run one call, pausing after each node named in `stops`; ends after the last of them.

        While it pauses, only values that later nodes read are held.
        """
        self.start(args, kwargs)
        left = len(stops)
        for node in self.graph.nodes:
            if not left:
                return
            self.step(node)
            if node.name in stops:
                left -= 1
                yield node.name

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make ready for a call that `step` carries out node by node."""
        self.env = {}
        self.args_iter = iter(self._values(args, kwargs))

    def step(self, node: fx.Node) -> None:
        """Run the next node and drop what no later one reads."""
        self.env[node] = self.run_node(node)
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]

    def close(self) -> None:
        """Let go of all values, and of closures that may refer to this runner.

        Else what a run held would stay until Python next looks for cycles, batch after batch.
        """
        self.env, self.args_iter = {}, iter(())
        self._reads, self._override = Reads(), {}

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        flat = iter(pytree.tree_leaves((args, kwargs)))
        values = []
        for spec in self._program.graph_signature.input_specs:
            own = spec.target is None or spec.kind.name == "USER_INPUT"
            values.append(next(flat) if own else Held(str(spec.target), self._weights))
        if self._held is not None:  # backward is told of all that a segment reads
            values = [v.get() if isinstance(v, Held) else v for v in values]
        values = [v if isinstance(v, Held) else self._where.of(v) for v in values]
        return [_double(v) for v in values] if self._double else values

    def value(self, node: fx.Node) -> Any:
        """Return the value of a node that was run; a stored array is fetched."""
        found = self.env[node]
        if not isinstance(found, Held):
            return found
        array = found.get()
        self._fetched.append(array)
        return self._where.of(array)

    def map_nodes_to_values(self, args: Argument, n: fx.Node) -> Any:
        """Return arguments with values in place of nodes."""
        return fx.node.map_arg(args, self.value)

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node, which reads what `reads` make of its operands."""
        changed = {}
        offered = self._reads.places.get(n.name, ())
        for source in n.all_input_nodes if offered else ():
            if source.name in offered:
                changed[source] = self.env[source]
                self.env[source] = self._reads.of(n, source.name, self.value(source))
        try:
            result = self._execute(n)
        finally:
            self.env.update(changed)
        let_go(self._fetched)
        self._fetched.clear()
        if self._watch is not None:
            self._watch(n.name, result)
        return result

    def _execute(self, n: fx.Node) -> Any:
        in_parts = self._double and not torch.is_grad_enabled()
        place, compute = IN_PARTS.get(n.target, (0, None)) if in_parts else (0, None)
        given: Any = n.args[place] if compute is not None else None
        if compute is None or not isinstance(self.env.get(given), Held):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        large = args[place].numel() >= LARGE and args[place].is_floating_point()
        return compute(*args, **kwargs) if large else self.call_function(n.target, args, kwargs)

    def call_function(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator, its arguments as wide as the runner computes."""
        assert not isinstance(target, str)
        args, kwargs = self._made_ready(args, kwargs)
        return target(*args, **kwargs)

    def _made_ready(self, args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments on the device that is computed on, and as wide."""
        args, kwargs = self._where.of((args, kwargs))
        if self._widen is not None:
            args, kwargs = pytree.tree_map(self._widen, (args, kwargs))
        return args, kwargs


class OverridingRunner(Runner):
    """A runner that also replaces whole nodes by functions of their arguments."""

    def _execute(self, n: fx.Node) -> Any:
        if n.name not in self._override:
            return super()._execute(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self._override[n.name](*self._made_ready(args, kwargs))


def _double(value: object) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else \
            value.to(torch.complex128) if value.is_complex() else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else \
            torch.complex128 if value.is_complex else value
    return value


def widened(to: torch.dtype | None, value: object) -> Any:
    """Return a value, or a type that an operator is given, as the float `to`, but for float64."""
    if to is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(to) if value.dtype in FLOATS else value
    return to if isinstance(value, torch.dtype) and value in FLOATS else value
