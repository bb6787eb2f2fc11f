"""The algebra against brute force: it prunes only what marks allow, and all that they allow.

Proofs catch missing coupling, not excess. Here every choice of rows of a tiny network is tried
(labels.py): what is allowed must be a choice of slices of the algebra's atoms, but in the cases of
`EXPLAINED`, each with its reason and an example.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from commuting import choose, quick_trace
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from labels import Marks, Unsupported, every_choice
from networks import Net, network, networks
from words import OFTEN

from spacompiler.axes.choices import Choice, coordinates, keep_mask
from spacompiler.axes.expressions import Atom, Expr, Sum, reasons, resolve
from spacompiler.groups.solution import Solution, solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.trace import Trace

NETWORKS = 150
SHAPES = ((2, 4), (2, 2, 4), (2, 4, 3), (2, 4, 2, 2), (2, 3, 2, 3))
NEVER = ("experts", "squeeze_excite", "take", "pixels", "upsample", "affine", "pool",
         "recurrent", "write", "response_norm")
TINY = [word for word in OFTEN if word not in NEVER]


def solved(found: Trace) -> tuple[Solution, frozenset[str]]:
    solution = solve(found.graph, TABLE, rewire=True)
    return solution, frozenset(solution.solver.norms)


def expressions(solution: Solution, marks: Marks) -> Iterator[tuple[tuple[str, int], Expr]]:
    """The algebra's word for every dimension that the marks speak of."""
    weights = solution.weights()
    for name, dim in marks.kept:
        if name.startswith("copies of "):
            node = name.removeprefix("copies of ")
            e = solution.solver.dims[node][dim]
            if e.size == marks.kept[name, dim].shape[1]:
                yield (name, dim), e
        elif name in weights:
            yield (name, dim), weights[name][dim]


# --- sound: what the algebra prunes, the marks allow --------------------------------------------


def allowed(found: Trace, solution: Solution, norms: frozenset[str],
            choices: dict[Atom, Choice]) -> bool:
    weights = solution.weights()

    def given(name: str, dim: int) -> torch.Tensor | None:
        copies = name.startswith("copies of ")
        e = solution.solver.dims[name.removeprefix("copies of ")][dim] if copies else \
            weights[name][dim]
        kept = np.broadcast_to(keep_mask([e], choices), [e.size])
        return torch.from_numpy(kept.copy())[None]

    return bool(Marks(found, given=given, norms=norms, ragged=inside(solution)).run().valid.all())


def inside(solution: Solution) -> frozenset[str]:
    """Values inside a chain that is emitted as a gather."""
    solver = solution.solver
    return frozenset(name for name, deal in solver.deals.items()
                     if deal.first in solver._taken and name != deal.last)


# --- whole: what the marks allow, the algebra prunes --------------------------------------------


def missed(solution: Solution, marks: Marks) -> dict[str, int]:
    """How many allowed choices are no choice of slices of atoms, by what stands in the way."""
    found = dict(expressions(solution, marks))
    masks = {key: marks.kept[key][marks.valid].numpy() for key in found}
    count = int(marks.valid.sum())
    kept: dict[Atom, np.ndarray] = {}
    for key, e in found.items():
        for atom, at in coordinates(e):
            have = kept.setdefault(atom, np.zeros((count, atom.size), dtype=bool))
            for p, i in enumerate(at):
                if i >= 0:
                    have[:, i] |= masks[key][:, p]
    emptied = np.zeros(count, dtype=bool)
    for atom, have in kept.items():
        emptied |= ~have.any(1)
        if atom.frozen:
            have[:] = True
    wrong = np.zeros(count, dtype=bool)
    single = np.zeros(count, dtype=bool)
    for key, e in found.items():
        want = np.ones((count, e.size), dtype=bool)
        for atom, at in coordinates(e):
            there = at >= 0
            want[:, there] &= kept[atom][:, at[there]]
        single |= (want & ~masks[key])[:, cells(e)].any(1)
        wrong |= (want != masks[key]).any(1)
    reasons = {"a cell would be emptied": emptied | wrong & single,
               "missed": wrong & ~emptied & ~single}
    return {why: int(rows.sum()) for why, rows in reasons.items() if rows.any()}


@settings(max_examples=max(NETWORKS, settings().max_examples))
@given(networks(5, TINY, SHAPES, widths=(2, 3, 4)), st.integers(0, 9))
def test_the_algebra_and_the_marks_agree(net: Net, seed: int) -> None:
    note(str(net))
    try:
        compare(quick_trace(net, net.example()), seed)
    except Unsupported:
        assume(False)


def compare(found: Trace, seed: int) -> None:
    """Assert that what the algebra prunes is allowed, and all that is allowed it prunes."""
    solution, norms = solved(found)
    rng = np.random.default_rng(seed)
    marks = every_choice(found, norms, inside(solution))
    for _ in range(3):
        flat = {a: c for a, c in choose(solution, rng).items() if not c.outers}
        assert allowed(found, solution, norms, flat)
    assert "missed" not in missed(solution, marks) or explained(solution)


# What marks allow and the algebra does not: words of the reason it gives, why, and an example.
EXPLAINED = {
    "falls inside the product": (
        "a cut through a nest keeps no factor whole; single factors could still go",
        "x: 2x2x3\na = conv(x, out=4, kernel=1, groups=2)\nb = depthwise(a, times=2)\n"
        "c = roll(b, dim=1, shift=2)"),
    "does not factor": (
        "two ways to nest have no common refinement; some whole runs could still go",
        "x: 2x3x2x3\na = conv(x, out=4, kernel=1, groups=1)\nb = view(a, inner=4)"),
}


def cells(e: Expr) -> np.ndarray:
    """Mark the positions that lie in a part of a concatenation without any atom: such a part is
    a cell of one, in a nest too, that stays as long as the rest of its nest does."""
    e = resolve(e)
    if isinstance(e, Atom):
        return np.zeros(e.size, dtype=bool)
    if isinstance(e, Sum):
        found = np.concatenate([cells(p) if coordinates(p) else np.ones(p.size, dtype=bool)
                                for p in e.parts])
        return found if e.order is None else found[e.order]
    found, inner = np.full(e.size, not e.parts), e.size
    for part in e.parts:
        inner //= part.size
        found |= cells(part)[np.arange(e.size) // inner % part.size]
    return found


def traced(text: str) -> Trace:
    net = network(text)
    return quick_trace(net, net.example())


def explained(solution: Solution) -> bool:
    said = [*solution.solver.space.clashes, *(r for _, _, why in solution.frozen() for r in why)]
    said += [r for dims in solution.solver.dims.values() for e in dims for r in reasons(e)]
    return any(text in reason for text in EXPLAINED for reason in said)


@pytest.mark.parametrize("text", EXPLAINED)
def test_explained_cases(text: str) -> None:
    """Each is a gap indeed; one that the algebra closes goes from the table."""
    found = traced(EXPLAINED[text][1])
    solution, norms = solved(found)
    marks = every_choice(found, norms, inside(solution))
    assert missed(solution, marks).get("missed") and explained(solution)


def test_cells_are_not_emptied() -> None:
    """A part of a concatenation keeps at least a slice, though it could go whole."""
    found = traced(
        "x: 2x4\na = linear(x, out=4)\nb = roll(a, dim=1, shift=2)")
    solution, norms = solved(found)
    gaps = missed(solution, every_choice(found, norms, inside(solution)))
    assert gaps.keys() == {"a cell would be emptied"}


def test_a_cell_of_one_in_a_nest_stays_with_it() -> None:
    """Every second channel is read by nothing: it goes with its neighbour, not by itself."""
    found = traced("x: 2x4\na = linear(x, out=4)\nb = strided(a, dim=1, start=0, step=2)")
    solution, norms = solved(found)
    gaps = missed(solution, every_choice(found, norms, inside(solution)))
    assert gaps.keys() == {"a cell would be emptied"}


# --- the comparison can fail --------------------------------------------------------------------

FLIPPED = "x: 2x4\na = linear(x, out=4)\nb = flip(a, dim=1)\nc = join(a, b, how='add')"


def test_too_much_coupling_is_found() -> None:
    found = traced(FLIPPED)
    table = type(TABLE)({**TABLE, "flip": lambda s, n: (
        s.freeze(s.dims[next(n.refs())], "no"), s.put(n.outputs[0], s.dims[next(n.refs())]))})
    marks = every_choice(found, frozenset(), frozenset())
    assert missed(solve(found.graph, table), marks)["missed"] == 2
    assert not missed(solve(found.graph, TABLE), marks)


def test_too_little_coupling_is_found() -> None:
    found = traced(FLIPPED)
    table = type(TABLE)({**TABLE, "flip": lambda s, n: s.put(
        n.outputs[0], s.dims[next(n.refs())])})
    for rows, right in ((TABLE, True), (table, False)):
        solution = solve(found.graph, rows)
        (group,) = solution.groups.values()
        kept = np.arange(group.size) < group.size - 1
        assert allowed(found, solution, frozenset(), {group.atom: Choice(kept)}) == right
