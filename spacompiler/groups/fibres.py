"""Which groups keep their own indices under each slice of another."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TypeVar

from ..axes.expressions import Atom, Expr, Prod, Sum, resolve
from ..graph.ir import Tensor
from ..rows.findings import Contraction
from ..rows.solver import Solver

Mention = tuple[Atom, frozenset[Atom], frozenset[Atom]]


T = TypeVar("T")


class Once(dict[Expr, T]):
    """What a function says of each expression of a solved graph, asked once."""

    def __init__(self, ask: Callable[[Expr], T]) -> None:
        self._ask = ask

    def __missing__(self, e: Expr) -> T:
        normal = resolve(e)
        self[e] = found = self._ask(e) if normal is e else self[normal]
        return found


def _certain(e: Expr) -> frozenset[Atom]:
    """Atoms that have a coordinate at every position of the dimension, a normal form."""
    if isinstance(e, Atom):
        return frozenset((e,))
    parts = [_certain(p) for p in e.parts]
    if not parts:
        return frozenset()
    both = frozenset.union if isinstance(e, Prod) else frozenset.intersection
    return both(*parts)


def beside(e: Expr) -> list[Mention]:
    """Return (atom, atoms outside it, atoms inside it) for every mention in a normal form."""
    if isinstance(e, Atom):
        return [(e, frozenset(), frozenset())]
    if isinstance(e, Sum):
        return [mention for part in e.parts for mention in beside(part)]
    sure = [_certain(p) for p in e.parts]
    found = []
    for i, part in enumerate(e.parts):
        before = frozenset().union(*sure[:i])
        after = frozenset().union(*sure[i + 1 :])
        found += [(atom, outside | before, inside | after)
                  for atom, outside, inside in beside(part)]
    return found


def find_fibres(solver: Solver, weights: Mapping[str, Tensor], carried: Container[Atom],
            mentions: Mapping[Expr, list[Atom]]) -> dict[Atom, tuple[Atom, ...]]:
    """Outer atoms that accompany an atom in every tensor and in every contraction."""
    certain, placed = Once(_certain), Once(beside)
    stored = set().union(*[solver.dims[tensor.name] for tensor in weights.values()])
    outer = _outside(stored, carried, placed)
    live = {a: o for a, o in outer.items() if o}
    if not live:
        return {}
    matter, tensors = live.keys() | frozenset().union(*live.values()), set(solver.dims.values())
    dims = {e for e in set().union(*tensors) if
            (e in matter if isinstance(e, Atom) else not matter.isdisjoint(mentions[e]))}
    for tensor in {tuple([e for e in t if e in dims]) for t in tensors}:
        for d, e in enumerate(tensor):
            _narrow(live, placed[e], [certain[o] for o in tensor[:d]],
                    [certain[o] for o in tensor[d + 1 :]])
    for contraction in solver.contractions:
        _narrow_by_letters(live, contraction, mentions)
    order = {a: len(o) for a, o in live.items()}
    return {a: tuple(sorted(o, key=lambda x: (order.get(x, 0), x.serial)))
            for a, o in live.items() if o}


def _outside(stored: Iterable[Expr], carried: Container[Atom],
             placed: Mapping[Expr, list[Mention]]) -> dict[Atom, frozenset[Atom]]:
    """Candidates: what stands to the left of an atom inside one dimension of a stored array."""
    found: dict[Atom, frozenset[Atom]] = {}
    for e in stored:
        for atom, outside, _ in () if isinstance(e, Atom) else placed[e]:
            if outside and atom in carried:
                found[atom] = found.get(atom, frozenset()) | outside - {atom}
    return found


def _narrow(live: dict[Atom, frozenset[Atom]], mentioned: Iterable[Mention],
            left: Iterable[frozenset[Atom]], right: Iterable[frozenset[Atom]]) -> None:
    """Keep what accompanies an atom in a tensor once, from outside: in its own dimension, or in
    one to the `left` of it."""
    for atom, outside, inside in mentioned:
        if live.get(atom):
            live[atom] = frozenset([
                o for o in live[atom] if o not in inside and not any([o in sure for sure in right])
                and (o in outside) != (sum([o in sure for sure in left]) == 1)])


def _narrow_by_letters(live: dict[Atom, frozenset[Atom]], contraction: Contraction,
                       mentions: Mapping[Expr, list[Atom]]) -> None:
    """An atom shared by operands of a contraction is fibred only under letters shared alike."""
    for letter, e in contraction.letters.items():
        if live.keys().isdisjoint(mentions[e]):
            continue
        mentioned = [a for a in mentions[e] if live.get(a) and not live[a] <= {*mentions[e]}]
        with_it = [o for o in contraction.operands if letter in o] if mentioned else []
        if len(with_it) > 1:
            common = frozenset.intersection(*with_it)
            allowed = {atom for c in common for atom in mentions[contraction.letters[c]]}
            for atom in mentioned:
                live[atom] &= allowed
