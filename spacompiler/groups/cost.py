"""What a network costs, as a function of how many slices each group keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from ..axes.expressions import Atom, Expr, Prod, atoms, resolve
from .solution import Solution


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
        for i in {i for a in changed for i in self._by_atom.get(a, ())}:
            value = self._value(self.terms[i])
            self.total += value - self._values[i]
            self._values[i] = value
        return self.total

    def beside(self, changed: Iterable[Atom]) -> frozenset[Atom]:
        """Return the atoms that stand in a term with any of these (themselves included)."""
        touched = {i for a in changed for i in self._by_atom.get(a, ())}
        return frozenset(a for i in touched for e in self.terms[i].exprs for a in atoms(e))

    def change(self, counts: Mapping[Atom, int]) -> int:
        """Return by how much the total would change, without changing it."""
        touched = {i for a in counts for i in self._by_atom.get(a, ())}
        before = sum(self._values[i] for i in touched)
        kept = {a: self.counts.get(a, a.size) for a in counts}
        self.counts.update(counts)
        after = sum(self._value(self.terms[i]) for i in touched)
        self.counts.update(kept)
        return after - before


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


_TERMS: dict[str, Callable[[Solution], list[Term]]] = {
    "params": lambda s: _params(s, set(), "outside"),
    "body": lambda s: _params(s, heads(s), "outside"),
    "macs": _macs,
}


def cost(solution: Solution, metric: str) -> Cost:
    """Return the cost of a network: parameters, parameters of the body, or MACs.

    MACs count multiply-accumulates of one forward pass at the traced sizes, per contraction
    (linear, convolution, attention); element-wise work is not counted. All three are those of the
    whole network where parts of it are compiled.
    """
    return Cost(_TERMS[metric](solution))
