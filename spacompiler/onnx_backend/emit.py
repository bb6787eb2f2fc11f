"""Carry out a plan on an ONNX graph: slice initialisers, re-write sizes, drop what is dead.

Sizes that a plan changes stand in attributes, in constants, or in shape arithmetic at run time.
The pruned graph is inferred anew on the way: where arithmetic gives the wanted size by itself
(it reads a shape that shrank) nothing is touched; a constant is changed at its source; else the
computed size is scaled. At the end every value must have the shape that the algebra says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from ..axes.choices import Choices, kept_size, take
from ..axes.expressions import atoms
from ..errors import ProofError
from ..groups.solution import Solution
from ..plan.effects import NormChange, norm_changes
from ..rows.findings import Path
from .clones import clean, forget_bodies, same_nodes, store, values_of
from .read.shapes import Facts, infer
from .read.stored import release
from .read.trace import OnnxTrace, Place
from .run.constants import Constants

MaybeWrong = Mapping[str, Choices]


class Arrays:
    """Pruned arrays by name, sliced when they are asked for."""

    def __init__(self, trace: OnnxTrace, solution: Solution, choices: Choices,
                 wrong: MaybeWrong | None = None, *, double: bool = False) -> None:
        self._trace, self._dims, self._choices = trace, solution.weights(), choices
        self._wrong, self._double = wrong or {}, double
        self._gains: dict[str, NormChange] = {
            c.norm.gain: c for c in norm_changes(solution, choices)}

    def changed(self) -> Iterator[str]:
        """Yield the names of the arrays that a plan or a repair changes."""
        for name, dims in self._dims.items():
            if name in self._gains or name in self._trace.repaired or any(
                    a in self._choices for e in dims for a in atoms(e)):
                yield name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the sizes that stay of a stored array."""
        return tuple(kept_size(e, self._choices) for e in self._dims[name])

    def dtype(self, name: str) -> ir.DataType:
        """Corrected gains are kept in float64 where they are proved in it."""
        kept = ir.DataType(self._trace.facts.types[name])
        return ir.DataType.DOUBLE if self._double and name in self._gains else kept

    def array(self, name: str) -> np.ndarray:
        """Return the kept part of a stored array, gains of RMSNorms corrected."""
        array = take(self._trace.stored(name), self._dims[name],
                     self._wrong.get(name, self._choices))
        release(self._trace.model, name)
        change = self._gains.get(name)
        if change is not None:
            offset = change.norm.offset
            array = (array.astype(np.float64) + offset) * change.gain - offset
            array = array.astype(self.dtype(name).numpy())
        return np.ascontiguousarray(array)


def rewrite(trace: OnnxTrace, solution: Solution, choices: Choices,
            wrong: MaybeWrong | None = None, *, double: bool = False) -> ir.Model:
    """Return the pruned model; arrays are sliced when they are read.

    With `double` what is corrected (gains and eps of RMSNorms) is not rounded to float32.

    Raises ProofError if a value does not have the shape that the algebra gives it.
    """
    model = trace.model.clone()
    arrays = Arrays(trace, solution, choices, wrong)
    nodes = dict(zip(trace.nodes, same_nodes(trace, model), strict=True))
    values = {v.name: v for v in values_of(model)}
    for name in arrays.changed():
        store(model, values[name], _lazy(arrays, name), arrays.shape(name))
    forget_bodies(model)
    _Sizes(trace, solution, choices, model, nodes).write()
    if double:
        exact = Arrays(trace, solution, choices, wrong, double=True)
        for change in norm_changes(solution, choices):
            values[change.norm.gain].const_value = _lazy(exact, change.norm.gain)
    clean(model)
    return model


def _lazy(arrays: Arrays, name: str) -> ir.LazyTensor:
    dtype = arrays.dtype(name)
    return ir.LazyTensor(
        lambda: ir.Tensor(arrays.array(name), dtype=dtype, name=name), dtype=dtype,
        shape=ir.Shape(arrays.shape(name)), name=name)


@dataclass
class _Sizes:
    """Writes the solver's edits into a cloned model."""

    trace: OnnxTrace
    solution: Solution
    choices: Choices
    model: ir.Model
    nodes: dict[str, ir.Node]

    def write(self) -> None:
        wanted = self._wanted()
        for name, edits in wanted.items():
            for place, changes in edits.items():
                self._direct(name, place, changes)
        by_node = {id(self.nodes[n]): edits for n, edits in wanted.items()}
        live = {id(node) for node in self.nodes.values()}

        def visit(node: ir.Node, facts: Facts) -> None:
            if id(node) in live:
                self._computed(node, by_node.get(id(node), {}), facts)

        sizes = {n: a.shape for n, a in self.trace.feeds.items()}
        from .run.session import run

        facts = infer(self.model, sizes, visit=visit,
                      observe=lambda names: run(self.model, self.trace.feeds, names))
        self._check(facts)

    def _wanted(self) -> dict[str, dict[Place, dict[int | None, float]]]:
        """node -> place -> element (None: the whole) -> value after pruning."""
        found: dict[str, dict[Place, dict[int | None, float]]] = {}
        for edit in self.solution.solver.edits:
            if kept_size(edit.when, self.choices) != edit.when.size:
                value = kept_size(edit.expr, self.choices) if edit.value is None else edit.value
                self._want(found, edit.node, edit.path, value)
        for change in norm_changes(self.solution, self.choices):
            self._want(found, change.norm.eps_node, ("args", change.norm.eps_arg), change.eps)
        return found

    def _want(self, found: dict[str, dict[Place, dict[int | None, float]]], node: str, path: Path,
              value: float) -> None:
        place = self.trace.places.get((node, path[1]))
        if place is not None:
            element = path[2] if len(path) > 2 else None
            found.setdefault(node, {}).setdefault(place, {})[element] = value

    # --- attributes and constants -------------------------------------------------------------

    def _direct(self, name: str, place: Place, changes: Mapping[int | None, float]) -> None:
        node = self.nodes[name]
        if place.kind == "attr":
            _set_attribute(node, place.key, changes, self._dense[name, place])
            return
        value = node.inputs[place.key] if place.key < len(node.inputs) else None
        if value is None:
            self._new_input(name, place, changes)
            return
        for element, new in changes.items():
            edge = _source(self.trace.facts, node, place.key, element or 0)
            if edge is not None:
                self.constants.set(*edge, new, follows=node.op_type == "Reshape")

    @cached_property
    def _dense(self) -> dict[tuple[str, Place], Any]:
        """The dense value of each argument, of those that the file leaves out as well."""
        made = {node.name: node for node in self.trace.graph.nodes}
        return {(name, place): made[name].arg(at, "")
                for (name, at), place in reversed(self.trace.places.items())}

    @cached_property
    def constants(self) -> Constants:
        """The constants of the model that is re-written."""
        return Constants(self.model)

    def _new_input(self, name: str, place: Place, changes: Mapping[int | None, float]) -> None:
        node, dense = self.nodes[name], list(self._dense[name, place])
        for element, new in changes.items():
            dense[element or 0] = new
        made = self.constants.add(np.array(dense, dtype=np.int64),
                                  f"{node.outputs[0].name}_sizes")
        while len(node.inputs) <= place.key:
            node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(place.key, made)
        node.attributes.pop("num_outputs", None)

    # --- what is computed at run time ---------------------------------------------------------

    def _computed(self, node: ir.Node, edits: Mapping[Place, Mapping[int | None, float]],
                  facts: Facts) -> None:
        """Numbers that a node is given are what they were, but for those that a plan changes."""
        changes = {p.key: c for p, c in edits.items() if p.kind == "input"}
        for i, value in enumerate(node.inputs):
            was = self.trace.facts.known.get(value.name or "") if value is not None else None
            now = facts.known.get(value.name or "") if value is not None else None
            if value is None or was is None or now is None or value.const_value is not None:
                continue
            want = np.array(was)
            for element, new in changes.get(i, {}).items():
                if want.dtype.kind == "f" or want.reshape(-1)[element or 0] > 0:
                    want.reshape(-1)[element or 0] = new
            if node.op_type == "Slice" and i == 2:
                want = np.where(self._whole(node, was, now, facts), now, want)
            if not np.array_equal(want, now):
                self._restore(node, i, want, now, facts)

    def _whole(self, node: ir.Node, was: np.ndarray, now: np.ndarray,
               facts: Facts) -> np.ndarray:
        """True where an end of a slice is the size of a dimension, before and after."""
        name = node.inputs[0].name or ""  # type: ignore[union-attr]
        ends = set(zip(self.trace.facts.shapes[name], facts.shapes[name], strict=True))
        return np.array([pair in ends for pair in zip(was.tolist(), now.tolist(), strict=True)])

    def _restore(self, node: ir.Node, index: int, want: np.ndarray, now: np.ndarray,
                 facts: Facts) -> None:
        value = node.inputs[index]
        assert value is not None
        off = want != now
        if value.name in self.trace.facts.fixed or want.dtype.kind not in "iu" or \
                (np.minimum(want, now)[off] <= 0).any():
            made = self.constants.add(want, f"{value.name}_dense")
        else:
            common = np.gcd(want, now)
            times, over = (np.where(off, n // np.maximum(common, 1), 1) for n in (want, now))
            made = self._scaled(node, value, times.astype(want.dtype), over.astype(want.dtype))
        node.replace_input_with(index, made)
        _know(facts, made, want)

    def _scaled(self, node: ir.Node, value: ir.Value, times: np.ndarray,
                over: np.ndarray) -> ir.Value:
        """Insert value * times / over: a size that varies between calls keeps varying."""
        assert node.graph is not None
        name = f"{value.name}_{node.outputs[0].name}"
        for op, numbers in (("Mul", times), ("Div", over)):
            by = self.constants.add(numbers, f"{name}_{op.lower()}_by")
            step = ir.Node("", op, [value, by], num_outputs=1, name=f"{name}_{op.lower()}")
            step.outputs[0].name = f"{name}_{op.lower()}"
            node.graph.insert_before(node, step)
            value = step.outputs[0]
        return value

    def _check(self, facts: Facts) -> None:
        read = {r for node in self.solution.graph.nodes for r in node.refs()}
        read.update(self.solution.graph.outputs)
        for node in self.solution.graph.nodes:
            for out in read.intersection(node.outputs):
                dims = self.solution.solver.dims[out]
                want = tuple(kept_size(e, self.choices) for e in dims)
                have = facts.shapes.get(out)
                if have is not None and have != want:
                    raise ProofError(
                        f"{out!r} would have the shape {list(have)}, not {list(want)}",
                        where=node.title(), why="a size in the file does not follow its axis",
                        fix="please report it; --ignore the groups of that layer to go on")


def _know(facts: Facts, value: ir.Value, array: np.ndarray) -> None:
    name = value.name or ""
    facts.known[name], facts.shapes[name] = array, array.shape
    facts.types[name] = int(ir.DataType.from_numpy(array.dtype))


def _set_attribute(node: ir.Node, key: str, changes: Mapping[int | None, float],
                   dense: Sequence[float] | float | None) -> None:
    have: Any = node.attributes[key].value if key in node.attributes else dense
    if None in changes:
        new: Any = changes[None]
    else:
        new = list(have)
        for element, value in changes.items():
            new[element] = value
    node.attributes[key] = ir.convenience.convert_attribute(key, new)


def _source(facts: Facts, node: ir.Node, index: int,
            element: int) -> tuple[ir.Node, int, int] | None:
    """Find where an element of an input is stored: (user, input, element) of a constant.

    Looks through Concat, Unsqueeze, Squeeze, Reshape, Cast and Identity; None if it is computed.
    """
    value = node.inputs[index]
    if value is None or value.const_value is not None:
        return None if value is None else (node, index, element)
    maker = value.producer()
    if maker is None:
        return None
    if maker.op_type in ("Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity"):
        return _source(facts, maker, 0, element)
    if maker.op_type == "Concat":
        for i, part in enumerate(maker.inputs):
            size = prod(facts.shapes.get(part.name or "", ())) if part is not None else 0
            if element < size:
                return _source(facts, maker, i, element)
            element -= size
    return None
