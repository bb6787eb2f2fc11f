"""einops-like patterns that say how an operator's dimensions relate; parsed once into terms.

`"b (g i) !*, (g o) i !*, (g o) -> b (g o) !*"` is a grouped convolution: letters are axes, equal
letters are one axis, `(g i)` is a nest (outer to inner), `...` any leading dimensions (aligned at
the right, broadcasting), `!` a dimension that can't be pruned and `!*` any number of them.
A letter that no output names is *read* (contracted); `i^` says that its removal also changes a
statistic.

>>> pattern = parse("... i, o i, o -> ... o")
>>> pattern.consumed
frozenset({'i'})
>>> [len(operand) for operand in pattern.inputs], pattern.outputs
([2, 2, 1], ((('...',), ('o',)),))
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

Term = tuple[str, ...]
ELLIPSIS: Term = ("...",)
FROZEN: Term = ("!",)
FROZEN_RUN: Term = ("!*",)
_TOKEN = re.compile(r"\(([^)]*)\)|(\.\.\.|!\*|!|[A-Za-z]\w*)")


@dataclass(frozen=True, eq=False)
class Pattern:
    """Terms per dimension of each operand and each result."""

    inputs: tuple[tuple[Term, ...], ...]
    outputs: tuple[tuple[Term, ...], ...]

    @cached_property
    def consumed(self) -> frozenset[str]:
        """Letters that no result carries."""
        return _letters(self.inputs) - _letters(self.outputs)


def _names(term: Term) -> tuple[str, ...]:
    return ("." + term[1],) if term[0] == "..." else tuple(filter(str.isidentifier, term))


def _letters(sides: tuple[tuple[Term, ...], ...]) -> frozenset[str]:
    return frozenset(
        letter for side in sides for term in side for letter in term if letter.isidentifier()
    )


def _side(text: str) -> tuple[Term, ...]:
    terms = [tuple(m[1].split()) if m[1] is not None else (m[2],) for m in _TOKEN.finditer(text)]
    if _TOKEN.sub("", text).strip():
        raise ValueError(f"cannot read {text!r} in a pattern")
    if sum(term in (ELLIPSIS, FROZEN_RUN) for term in terms) > 1:
        raise ValueError(f"{text!r} has more than one run of dimensions")
    return tuple(terms)


@cache
def parse(text: str) -> Pattern:
    """Parse `operands -> results`; raises ValueError on malformed text."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"{text!r} has no '->'")
    return Pattern(tuple(map(_side, left.split(","))), tuple(map(_side, right.split(","))))


@cache
def align(terms: tuple[Term, ...], rank: int) -> tuple[Term, ...]:
    """Expand the run of dimensions so that there is one term per dimension.

    >>> align(parse("... i -> i").inputs[0], 3)
    (('...', '1'), ('...', '0'), ('i',))
    """
    run = [i for i, term in enumerate(terms) if term in (ELLIPSIS, FROZEN_RUN)]
    missing = rank - len(terms) + len(run)
    if missing < 0 or (missing and not run):
        raise ValueError(f"{rank} dimensions do not fit {terms}")
    if not run:
        return terms
    (at,) = run
    many = [FROZEN] * missing
    if terms[at] == ELLIPSIS:
        many = [("...", str(missing - 1 - i)) for i in range(missing)]
    return (*terms[:at], *many, *terms[at + 1 :])


Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """A pattern at certain ranks: what each dimension is called (nothing: it can't be pruned).

    The dimensions of a run are called `.0`, `.1`, ... from the right. A place is (operand,
    dimension): of those with a name of their own, `first` are where a name comes first, as long
    as there is no nest; `later` has the other names and the nests in order. `frozen` are runs
    (operand, from, to) without names. `reads` are places, `letters` the names in each operand
    that is there; of these, `consumed` are in no result and `shared` the others that all
    operands have.
    """

    first: tuple[tuple[str, int, int], ...]
    later: tuple[tuple[Names, int, int], ...]
    frozen: tuple[tuple[int, int, int], ...]
    results: tuple[tuple[Names, ...], ...]
    reads: tuple[tuple[int, int], ...]
    letters: tuple[frozenset[str], ...]
    consumed: tuple[str, ...]
    shared: frozenset[str]


@cache
def fit(text: str, ranks: tuple[int | None, ...], results: tuple[int, ...]) -> Fit:
    """Fit a pattern to operands of so many dimensions (None: an absent one) and to results.

    >>> linear = fit("... i, o i, o -> ... o", (3, 2, None), (3,))
    >>> linear.first, linear.later
    ((('.1', 0, 0), ('.0', 0, 1), ('i', 0, 2), ('o', 1, 0)), ((('i',), 1, 1),))
    """
    pattern = parse(text)
    operands = [() if rank is None else _called(terms, rank)
                for terms, rank in zip(pattern.inputs, ranks, strict=False)]
    places = [(names, i, d) for i, terms in enumerate(operands) for d, names in enumerate(terms)]
    reads = [(i, d) for names, i, d in places if not pattern.consumed.isdisjoint(names)]
    letters = tuple(frozenset(name for term in names for name in term)
                    for names, rank in zip(operands, ranks, strict=True) if rank is not None)
    first: dict[str, tuple[int, int]] = {}
    later: list[tuple[Names, int, int]] = []
    for names, i, d in places:
        if len(names) == 1 and names[0] not in first and all(len(n) == 1 for n, _, _ in later):
            first[names[0]] = i, d
        elif names:
            later.append((names, i, d))
    frozen = [(i, d, d + 1) for names, i, d in places if not names]
    return Fit(tuple((name, *place) for name, place in first.items()), tuple(later), _runs(frozen),
               tuple(map(_called, pattern.outputs, results)), tuple(reads),
               letters, tuple(sorted(pattern.consumed & frozenset().union(*letters))),
               frozenset.intersection(*letters) - pattern.consumed)


def _runs(places: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Join runs that follow each other.

    >>> _runs([(0, 2, 3), (0, 3, 4), (1, 2, 3)])
    ((0, 2, 4), (1, 2, 3))
    """
    found: list[tuple[int, int, int]] = []
    for i, start, end in places:
        if found and found[-1][::2] == (i, start):
            i, start, _ = found.pop()
        found.append((i, start, end))
    return tuple(found)


def _called(terms: tuple[Term, ...], rank: int) -> tuple[Names, ...]:
    return tuple(map(_names, align(terms, rank)))
