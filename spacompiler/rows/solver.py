"""Relate the axes of a whole graph: one pass over its nodes, one table row per operator.

The solver holds an axis expression for each dimension of each tensor. A row (see `primitives`)
only relates dimensions; what no row knows is opaque and freezes what it touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..axes.expressions import ONE, Atom, Expr, Prod, is_frozen, resolve
from ..axes.space import Clash, Space
from ..graph.idioms import Deal, RmsNorm
from ..graph.ir import Graph, Node
from .findings import Contraction, Edit, Gather, Label, Path, Read

OUTSIDE = "used outside of the traced parts"
Row = Callable[["Solver", Node], None]


@dataclass(slots=True)
class Solver:
    """Axis expressions per tensor, and what the rows found out on the way.

    `bare` are the tensors that no stored array has a part in, `multiples` the sizes that a
    kernel takes only as multiples of a number, `least` how many slices of an axis must stay,
    `choosing` the nodes whose chosen positions are read, `labels` the tensors that hold such, and
    `scored` the axes that may shrink only if positions are chosen along them. With `rewire`, an
    operator that only moves positions of one axis may be emitted as a gather; `deals` are chains
    of such.
    """

    graph: Graph
    table: Mapping[str, Row]
    norms: Mapping[str, RmsNorm] = field(default_factory=dict)
    space: Space = field(default_factory=Space)
    dims: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    roles: list[tuple[Expr, str]] = field(default_factory=list)
    approximate: list[tuple[Expr, str]] = field(default_factory=list)
    multiples: list[tuple[Expr, int]] = field(default_factory=list)
    least: list[tuple[Expr, int]] = field(default_factory=list)
    choosing: frozenset[str] = frozenset()
    labels: dict[str, Label] = field(default_factory=dict)
    scored: list[tuple[Expr, str]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    opaque: list[Node] = field(default_factory=list)
    bare: set[str] = field(default_factory=set)
    rewire: bool = False
    deals: Mapping[str, Deal] = field(default_factory=dict)
    gathers: list[Gather] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)
    _asked: set[tuple[str, str]] = field(default_factory=set)
    _read: set[str] = field(default_factory=set)

    def solve(self) -> Solver:
        """Visit every node once; afterwards `dims` is final and in normal form."""
        stored: dict[str, tuple[Expr, ...]] = {}
        for tensor in self.graph.tensors.values():
            weight = tensor.weight
            if weight is not None:
                tensor.static = True
                if weight not in stored:
                    stored[weight] = tuple(map(self.space.atom, tensor.shape))
                    if tensor.kind == "outside":
                        self.freeze(stored[weight], OUTSIDE)
                self.dims[tensor.name] = stored[weight]
            elif tensor.kind in ("input", "constant"):
                why = f"model {tensor.kind} {tensor.name}"
                self.bare.add(tensor.name)
                self.dims[tensor.name] = tuple(self.space.atom(n, why) for n in tensor.shape)
        self._freeze_unused(stored)
        for node in self.graph.nodes:
            self._visit(node)
            if self.labels:
                self._mind(node)
        for value, stored_in in self.graph.written.items():
            for e, o in zip(self.dims[value], self.dims[stored_in], strict=True):
                self.space.relate(e, o, f"{value} is written back into {stored_in}")
        for name in self.graph.outputs:
            self.freeze(self.dims[name], f"model output {name}")
        self._settle()
        named = [label.axis for label in self.labels.values()]
        final = {e: resolve(e) for e in set[Expr]().union(
            named, [e for e, _ in self.least], *self.dims.values())}
        self.dims = {name: tuple(map(final.__getitem__, dims)) for name, dims in self.dims.items()}
        self.least = [(final[e], k) for e, k in self.least]
        self.labels = {name: Label(final[e], kind) for name, (e, kind) in self.labels.items()}
        return self

    def _freeze_unused(self, stored: Mapping[str, tuple[Expr, ...]]) -> None:
        """What code reads an array that adds nothing to the traced results, nobody has seen.

        Results without entries (no box was found, say) show nothing either.
        """
        used = self._used()
        names = {t.weight for t in self.graph.tensors.values()
                 if t.name in used or t.kind == "buffer"}
        for weight, dims in stored.items():
            if weight not in names:
                self.freeze(dims, "not used on the example inputs")

    def _used(self) -> set[str]:
        """Tensors with entries from which results with entries follow."""
        graph = self.graph
        empty = {t.name for t in graph.tensors.values() if 0 in t.shape}
        found = {*graph.outputs, *graph.written} - empty
        if not graph.outputs and not graph.written:  # all results are outputs
            found.update(out for node in graph.nodes for out in node.outputs if out not in empty)
        for node in reversed(graph.nodes):
            if not found.isdisjoint(node.outputs):
                found.update(node.reads())
                if empty:
                    found -= empty
        return found

    def _visit(self, node: Node) -> None:
        refs, tensors = node.reads(), self.graph.tensors
        if refs and tensors[refs[0]].static and all([tensors[ref].static for ref in refs]):
            for out in node.outputs:
                tensors[out].static = True
        elif self._looks_up(refs):
            for out in node.outputs:
                tensors[out].looked = True
        row = self.table.get(node.op)
        bare = self.bare.issuperset(refs)
        if bare:
            self.bare.update(node.outputs)
        if row is None and (bare or all(self._fixed(ref) for ref in refs)):
            why = f"computed without weights by {node.op}"
            self.freeze((e for ref in refs for e in self.dims[ref] if not is_frozen(e)), why)
            self.emit_fixed(node, why)
            return
        if node.name in self.deals and self._dealt(self.deals[node.name], node):
            return
        try:
            (row or opaque)(self, node)
        except (Clash, ValueError, LookupError, TypeError, ArithmeticError,
                StopIteration) as problem:
            self.give_up(node, f"{node.title()}: {problem}")
        silent = [out for out in node.outputs if out not in self.dims]
        if silent:
            self._by_products(node, silent)
        for out in node.outputs:
            if tensors[out].dynamic:
                self._freeze_dynamic(out)

    def _looks_up(self, refs: Sequence[str]) -> bool:
        """True of an array at positions that the network computes, and of that moved or copied.

        What the caller's numbers look up (an embedding) is an activation.
        """
        tensors = self.graph.tensors
        floats = [ref for ref in refs if "float" in tensors[ref].dtype]
        if len(floats) != 1 or not tensors[floats[0]].array:
            return False
        others = [ref for ref in refs if ref != floats[0]]
        if tensors[floats[0]].looked or not others:
            return not others
        return all("int" in tensors[ref].dtype and ref not in self.bare for ref in others)

    def _dealt(self, deal: Deal, node: Node) -> bool:
        """Take a chain as one gather, unless its axis is frozen or a nest (which views suit)."""
        e = resolve(self.dims[deal.source][deal.dim])
        if node.name == deal.first and not (isinstance(e, Prod) or is_frozen(e)):
            self._taken.add(deal.first)
        if deal.first not in self._taken:
            return False
        if node.name == deal.last:
            self.gather(node, deal.source, deal.dim, deal.order)
        else:
            self.emit_fixed(node, "inside a shuffle")
        return True

    def _by_products(self, node: Node, silent: Sequence[str]) -> None:
        """Results that a row says nothing about: harmless if nothing reads them."""
        if not self._read:
            self._read.update(self.graph.outputs, *(n.refs() for n in self.graph.nodes))
        if not self._read.isdisjoint(silent):
            self.give_up(node, f"by-products of {node.title()} are read")
        for out in silent:
            self.dims[out] = tuple(
                self.space.atom(n, f"by-product of {node.op}") for n in self.shape(out))

    def _fixed(self, ref: str) -> bool:
        return all(e is ONE or is_frozen(e) for e in self.dims[ref])

    def _freeze_dynamic(self, out: str) -> None:
        """A dimension that varies between calls is no axis of slices (batch, positions)."""
        for dim in self.graph.tensors[out].dynamic:
            expr = resolve(self.dims[out][dim])
            if isinstance(expr, Atom) and not expr.frozen:
                self.space.freeze(expr, "size varies between calls")

    def _mind(self, node: Node) -> None:
        """Positions that an operator reads without asking what they mean must stay as they are."""
        for ref in node.refs():
            if ref in self.labels and (node.name, ref) not in self._asked:
                self.space.freeze(self.labels[ref].axis, f"{node.title()} computes with positions")

    def _settle(self) -> None:
        """What was taken for scores freezes unless positions are chosen along it, one by one."""
        for name in {*self.graph.outputs, *self.graph.written} & self.labels.keys():
            self.space.freeze(self.labels[name].axis, f"positions leave the network in {name}")
        chosen = {resolve(label.axis) for label in self.labels.values()}
        for e, why in self.scored:
            if resolve(e) not in chosen or not isinstance(resolve(e), Atom):
                self.space.freeze(e, why)

    # --- what rows use ------------------------------------------------------------------------

    def shape(self, ref: str) -> tuple[int, ...]:
        """Return the traced sizes of a tensor."""
        return self.graph.tensors[ref].shape

    def freeze(self, exprs: Iterable[Expr], why: str) -> None:
        """Let the positions of all expressions stay; `why` goes into the report."""
        for e in exprs:
            if e is not ONE:
                self.space.freeze(e, why)

    def relate(self, a: Expr, b: Expr, node: Node) -> None:
        """Let two expressions keep the same positions; both freeze where they cannot."""
        if a is not b:
            self.space.relate(a, b, node)

    def put(self, name: str, dims: Sequence[Expr]) -> None:
        """Record the dimensions of a result; their sizes must be those that were traced."""
        shape, sizes = self.graph.tensors[name].shape, tuple([e.size for e in dims])
        if sizes != shape:
            raise ValueError(f"the row gives {sizes}, the program {shape}")
        self.dims[name] = tuple(dims)

    def emit_fixed(self, node: Node, why: str) -> None:
        """Give every result of a node new dimensions that are frozen for the reason `why`."""
        for out in node.outputs:
            self.dims[out] = tuple(self.space.atom(n, why) for n in self.shape(out))

    def give_up(self, node: Node, why: str) -> None:
        """Freeze everything that a node touches."""
        for ref in node.refs():
            self.freeze(self.dims[ref], why)
            if ref in self.labels:
                self.space.freeze(self.labels[ref].axis, why)
        self.emit_fixed(node, why)

    def label(self, node: Node, ref: str, kind: str = "position") -> Expr | None:
        """Return the axis that a tensor's values speak of; the row that asks sees to it that
        what it makes of them still holds when slices of that axis go."""
        label = self.labels.get(ref)
        if label is None or label.kind != kind:
            return None
        self._asked.add((node.name, ref))
        return None if is_frozen(label.axis) else label.axis

    def read(self, node: Node, ref: str, dim: int, how: str) -> None:
        """Record that a node reads tensor `ref` along dimension `dim` in the way `how` says."""
        self.reads.append(Read(node.name, ref, dim % len(self.dims[ref]), how))

    def gather(self, node: Node, source: str, dim: int, index: np.ndarray) -> None:
        """The result holds positions `index` of one dimension; raises Clash if it cannot be cut.

        One index serves all rows: what is fibred there is so under axes of that dimension only.
        """
        dims = list(self.dims[source])
        whole, dims[dim] = dims[dim], self.space.carve(dims[dim], index)
        self.put(node.outputs[0], dims)
        self.gathers.append(Gather(node.name, source, node.outputs[0], dim, index))
        alone = frozenset(("dealt",))
        self.contractions.append(Contraction(node.name, {"dealt": whole}, (alone, alone), ()))

    def edit(self, node: Node, path: Path, expr: Expr, *, when: Expr | None = None,
             value: float | None = None, plus: int = 0) -> None:
        """Let the number at `path` of a node follow `expr` (or be `value`) once `when` shrinks."""
        self.edits.append(Edit(node.name, path, expr, expr if when is None else when, value, plus))


def opaque(s: Solver, node: Node) -> None:
    """An operator that no table knows: its inputs and results freeze, and the report names it."""
    s.opaque.append(node)
    s.give_up(node, f"unknown operator {node.title()}")
