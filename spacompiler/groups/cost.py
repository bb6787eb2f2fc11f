"""What a network costs, as a function of how many slices each group keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from ..axes.expressions import Atom, Expr, Prod, atoms, resolve
from .solution import Solution

ITEM_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16,
              "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
              "int8": 1, "uint8": 1, "bool": 1}
"""Bytes of one number, 4 of any other kind."""


@dataclass(frozen=True, slots=True)
class Term:
    """factor x the product of some dimensions' sizes."""

    exprs: tuple[Expr, ...]
    factor: int = 1


def size_under(e: Expr, counts: Mapping[Atom, int]) -> int:
    """Return the size of a dimension when atoms keep `counts` slices."""
    e = resolve(e)
    if isinstance(e, Atom):
        return counts.get(e, e.size)
    sizes = [size_under(part, counts) for part in e.parts]
    return prod(sizes) if isinstance(e, Prod) else sum(sizes)


@dataclass
class Cost:
    """A sum of terms, evaluated incrementally: only terms that mention a changed atom."""

    terms: list[Term]
    counts: dict[Atom, int] = field(default_factory=dict)
    _by_atom: dict[Atom, list[int]] = field(default_factory=dict)
    _values: list[int] = field(default_factory=list)
    total: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._values = [self._value(t) for t in self.terms]
        self.total = sum(self._values)
        for i, term in enumerate(self.terms):
            for atom in {a for e in term.exprs for a in atoms(e)}:
                self._by_atom.setdefault(atom, []).append(i)

    def _value(self, term: Term) -> int:
        return term.factor * prod(size_under(e, self.counts) for e in term.exprs)

    def set(self, counts: Mapping[Atom, int]) -> int:
        """Change some counts and return the new total."""
        changed = {a: n for a, n in counts.items() if self.counts.get(a, a.size) != n}
        self.counts.update(changed)
        for i in self.touched(changed):
            value = self._value(self.terms[i])
            self.total += value - self._values[i]
            self._values[i] = value
        return self.total

    def change(self, counts: Mapping[Atom, int], among: Iterable[int] | None = None) -> int:
        """Return by how much the total would change, without changing it.

        `among` are the terms that are looked at, by their places, if not all of them count.
        """
        touched = self.touched(counts) if among is None else among
        kept = {a: self.counts.get(a, a.size) for a in counts}
        self.counts.update(counts)
        change = sum([self._value(self.terms[i]) - self._values[i] for i in touched])
        self.counts.update(kept)
        return change

    def touched(self, changed: Iterable[Atom]) -> frozenset[int]:
        """Return the places of the terms that mention any of these atoms."""
        return frozenset(i for a in changed for i in self._by_atom.get(a, ()))

    def mentioned(self, term: int) -> list[Atom]:
        """Return the atoms that the term at a place mentions."""
        return [a for e in self.terms[term].exprs for a in atoms(e)]


def heads(solution: Solution) -> set[str]:
    """Stored arrays of embeddings and of the output layer: what `body` leaves out."""
    graph = solution.graph
    if graph.heads is not None:
        return set(graph.heads)
    makers = {out: node for node in graph.nodes for out in node.outputs}
    found = {graph.tensors[name].weight for name in solution.solver.tables}
    contracted = {c.node for c in solution.solver.contractions}
    for name in graph.outputs:
        node = makers.get(name)
        while node is not None and node.name not in contracted:
            refs = list(node.refs())
            node = makers.get(refs[0]) if len(refs) == 1 else None
        if node is not None:
            found |= {graph.tensors[ref].weight for ref in node.refs()}
    return {weight for weight in found if weight is not None}


def _params(solution: Solution, skip: set[str], *kinds: str) -> list[Term]:
    kind = {t.weight: t.kind for t in solution.graph.weights().values()}
    return [Term(dims) for weight, dims in solution.weights().items()
            if weight not in skip and kind[weight] in ("parameter", *kinds)]


def _macs(solution: Solution) -> list[Term]:
    outside = [Term((), solution.graph.outside_macs)]
    return [*(Term(c.macs, c.factor) for c in solution.solver.contractions if c.macs), *outside]


def _bytes(solution: Solution) -> list[Term]:
    kinds = {t.weight: t.dtype for t in solution.graph.weights().values()}
    return [Term(dims, ITEM_BYTES.get(kinds[weight], 4))
            for weight, dims in solution.weights().items()]


def _active(solution: Solution) -> list[Term]:
    """Parameters that one token meets: of a mixture's experts as many as a router takes."""
    taken = {e: k for e, k in solution.solver.least if isinstance(e, Atom)}

    def term(found: Term) -> Term:
        routed = next((i for i, e in enumerate(found.exprs)
                       if len(found.exprs) > 2 and resolve(e) in taken), None)
        if routed is None:
            return found
        rest = (*found.exprs[:routed], *found.exprs[routed + 1:])
        return Term(rest, found.factor * taken[resolve(found.exprs[routed])])  # type: ignore[index]

    return [term(t) for t in _params(solution, set(), "outside")]


ATTENTION = "scaled_dot_product_attention"


def cached(solution: Solution) -> list[Term]:
    """Bytes of keys and values, one token of one row: of each attention the smallest tensors on
    the way from a product with weights to its second and third operand, as caches keep them."""
    graph = solution.graph
    makers = {out: node for node in graph.nodes for out in node.outputs}
    products = {c.node for c in solution.solver.contractions}
    stored = {a for dims in solution.weights().values() for e in dims for a in atoms(e)}
    found: dict[str, Term] = {}
    for node in graph.nodes:
        if ATTENTION not in node.op:
            continue
        for name in list(node.refs())[1:3]:
            at, best = name, name
            while (maker := makers.get(at)) is not None and maker.name not in products:
                at = next(iter(maker.refs()), "")
                if at in graph.tensors and prod(graph.tensors[at].shape) \
                        < prod(graph.tensors[best].shape):
                    best = at
            exprs = tuple(e for e in solution.dims(best) if stored & set(atoms(e)))
            found.setdefault(best, Term(exprs, ITEM_BYTES.get(graph.tensors[best].dtype, 4)))
    return list(found.values())


def _memory(solution: Solution, tokens: int) -> list[Term]:
    return [*_bytes(solution), *(Term(t.exprs, t.factor * tokens) for t in cached(solution))]


_TERMS: dict[str, Callable[[Solution, int], list[Term]]] = {
    "params": lambda s, _: _params(s, set(), "outside"),
    "body": lambda s, _: _params(s, heads(s), "outside"),
    "macs": lambda s, _: _macs(s),
    "bytes": lambda s, _: _bytes(s),
    "active": lambda s, _: _active(s),
    "memory": _memory,
}


def cost(solution: Solution, metric: str, tokens: int = 0) -> Cost:
    """Return the cost of a network: one row of the table above.

    MACs count multiply-accumulates of one forward pass at the traced sizes, per contraction
    (linear, convolution, attention); element-wise work is not counted. Parameters and MACs are
    those of the whole network where parts of it are compiled. Memory is bytes of weights and of
    keys and values of so many `tokens` (batch times length).
    """
    return Cost(_TERMS[metric](solution, tokens))
