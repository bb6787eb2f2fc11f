"""Axes in another order: shuffles, flips, rolls and strided slices, alone and where they meet."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from commuting import choose, differences, quick_trace, table_of
from hypothesis import assume, given
from hypothesis import strategies as st
from networks import network

from spacompiler import models_zoo
from spacompiler.axes.choices import Choice, keep_mask, kept_size
from spacompiler.axes.expressions import atoms, concat, deal, product, show
from spacompiler.axes.space import Clash, Space
from spacompiler.groups.solution import Solution, solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.tolerances import PROOF
from spacompiler.torch_backend.emit.module import operate
from spacompiler.torch_backend.emit.program import Rewritten, rewrite, run_pruned
from spacompiler.torch_backend.prove import prove
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.weights import runs_like

# name: (network, groups of the first layer's rows with gathers, and as views do them)
FLAT = "x: 2x4\na = linear(x, out={})\n"
IMAGE = "x: 2x3x4x4\na = conv(x, out={}, kernel=1, groups={})\n"
ROWS = {
    "flip": (FLAT.format(6) + "b = flip(a, dim=1)", "6", "6"),
    "flip meets": (FLAT.format(6) + "b = flip(a, dim=1)\nc = join(a, b, how='add')",
                   "deal(3+3)", "deal(3+3)"),
    "flip meets, odd": (FLAT.format(5) + "b = flip(a, dim=1)\nc = join(a, b, how='add')",
                        "deal(1+2+2)", "deal(1+2+2)"),
    "roll": (FLAT.format(6) + "b = roll(a, dim=1, shift=2)", "4+2", "4+2"),
    "roll back": (FLAT.format(6) + "b = roll(a, dim=1, shift=-2)", "2+4", "2+4"),
    "roll meets": (FLAT.format(6) + "b = roll(a, dim=1, shift=2)\nc = join(a, b, how='add')",
                   "2+2+2", "2+2+2"),
    "strided": (FLAT.format(6) + "b = strided(a, dim=1, start=1, step=2)", "3*(1+1)", "3*(1+1)"),
    "strided, uneven": (FLAT.format(5) + "b = strided(a, dim=1, start=0, step=2)",
                        "deal(3+2)", "5!"),
    "permute and flatten": (IMAGE.format(6, 1) + "b = permute_flatten(a, order=(2, 1, 3))",
                            "6", "6"),
    "concat with the input": (FLAT.format(6) + "b = cat(x, a, dim=1)", "6", "6"),
    "grouped convolutions": (IMAGE.format(6, 1) + "b = conv(a, out=8, kernel=1, groups=2)",
                             "2*3", "2*3"),
    "shuffle": (IMAGE.format(6, 1) + "b = shuffle(a, dim=1, groups=2)", "6", "2*3"),
    "shuffle meets": (
        IMAGE.format(6, 1) + "b = shuffle(a, dim=1, groups=2)\nc = join(a, b, how='add')",
        "deal(2+1+1+1+1)", "2!*3!"),  # two channels stay where they are, four go in a ring
    "shuffle, then groups": (
        IMAGE.format(12, 1) + "b = shuffle(a, dim=1, groups=2)\n"
        "c = conv(b, out=6, kernel=1, groups=3)", "deal(3*4)", "2*3*2"),
    "groups, shuffle, groups": (  # two nests over one axis: no common refinement
        "x: 2x3x4x4\na = conv(x, out=12, kernel=1, groups=3)\nb = shuffle(a, dim=1, groups=3)\n"
        "c = conv(b, out=6, kernel=1, groups=3)", "3!*4!", "3!*4!"),
    "chain": (
        IMAGE.format(12, 1) + "b = shuffle(a, dim=1, groups=2)\nc = halves(b, dim=1, "
        "how='rotate')\nd = shuffle(c, dim=1, groups=3)\ne = halves(d, dim=1, how='first')",
        "deal(2+4+4+2)", "2*(1+1+1+1+1+1)"),
    "shuffle in each head": (
        "x: 2x4x6\na = linear(x, out=8)\nb = factor(a, dim=2, inner=4)\n"
        "c = shuffle(b, dim=3, groups=2)\nd = halves(c, dim=3, how='rotate')",
        "2*deal(2+2)", "2*2*(1+1)"),
}


@cache
def solved(name: str, rewire: bool) -> Solution:
    net = network(ROWS[name][0])
    return solve(quick_trace(net, net.example()).graph, TABLE, rewire=rewire)


@pytest.mark.parametrize("rewire", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, rewire: bool) -> None:
    text, gathered, viewed = ROWS[name]
    net = network(text)
    found = quick_trace(net, net.example())
    solution = solve(found.graph, TABLE, rewire=rewire)
    assert show(solution.dims("a_0")[0]) == (gathered if rewire else viewed)
    rng = np.random.default_rng(0)
    for _ in range(6):
        errors = differences(found, solution, choose(solution, rng))
        assert max(errors.values()) <= PROOF.value


def test_frozen_rows_say_why() -> None:
    for name, text in (("groups, shuffle, groups", "factor"), ("shuffle meets", "factor"),
                       ("strided, uneven", "equal runs")):
        said = [r for _, _, why in solved(name, False).frozen() for r in why]
        assert any(text in reason for reason in said), said


# --- the algebra --------------------------------------------------------------------------------

ORDERS = st.permutations(range(12)).map(np.array)


def pick(space: Space, e: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {a: Choice(table_of(rng, (a.size,), int(rng.integers(1, a.size + 1))))
            for a in atoms(e)}


@given(ORDERS, ORDERS, st.integers(0, 99))
def test_deals_compose(one: Any, two: Any, seed: int) -> None:
    space = Space()
    e = concat((space.atom(5), space.atom(7)))
    twice = deal(deal(e, one), two)
    choices = pick(space, e, seed)
    kept = keep_mask([e], choices)
    assert np.array_equal(keep_mask([twice], choices), kept[one][two])
    assert np.array_equal(keep_mask([deal(twice, np.argsort(one[two]))], choices), kept)
    assert show(deal(twice, np.argsort(one[two]))) == "5+7"


@given(ORDERS, st.integers(1, 12), st.sampled_from(["atom", "sum", "nest", "inner"]),
       st.integers(0, 99))
def test_carved_positions_are_those_asked_for(order: Any, count: int, kind: str,
                                              seed: int) -> None:
    """carve refines a dimension so that the positions asked for have an expression."""
    space = Space()
    e = {"atom": lambda: space.atom(12), "sum": lambda: concat((space.atom(5), space.atom(7))),
         "nest": lambda: space.factor(space.atom(12), 4),
         "inner": lambda: space.split(space.atom(4), 2)}[kind]()
    if isinstance(e, tuple):
        e = product(e) if kind == "nest" else product((space.atom(3), concat(e)))
    try:
        part = space.carve(e, order[:count])
    except Clash:
        assume(False)
    choices = pick(space, e, seed)
    kept = np.broadcast_to(keep_mask([e], choices), [12])
    assert np.array_equal(np.broadcast_to(keep_mask([part], choices), [count]),
                          kept[order[:count]])
    assert kept_size(part, choices) == kept[order[:count]].sum()


def test_equal_deals_are_one() -> None:
    space, order = Space(), np.roll(np.arange(12), 5)
    a = space.atom(12)
    space.unify(deal(a, order), deal(a, order))
    assert atoms(deal(a, order)) == [a]


def test_nests_in_other_orders_clash() -> None:
    space, order = Space(), np.roll(np.arange(12), 5)
    one, two = (product((space.atom(a), space.atom(b))) for a, b in ((3, 4), (4, 3)))
    with pytest.raises(Clash, match="nest differently"):
        space.unify(deal(one, order), two)


@given(ORDERS, ORDERS, st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 99))
def test_dealt_axes_unify(one: Any, two: Any, k: int, seed: int) -> None:
    """Two dimensions in different orders agree position by position, at any nesting."""
    space = Space()
    a, b = space.atom(12), concat((space.atom(4), space.atom(8)))
    left, right = deal(a, one), deal(b, two)
    space.unify(left, right)
    choices = pick(space, concat((left, right)), seed)
    assert np.array_equal(keep_mask([left], choices), keep_mask([right], choices))
    before = show(left), show(right)
    space.unify(left, right)
    assert (show(left), show(right)) == before
    try:
        outer, inner = space.factor(left, k)
    except Clash:
        return
    choices = pick(space, concat((left, right)), seed)
    grid = np.broadcast_to(keep_mask([left], choices), [12]).reshape(-1, k)
    assert np.array_equal(grid, np.broadcast_to(keep_mask([outer, inner], choices), grid.shape))


@given(ORDERS)
def test_an_axis_that_meets_itself_goes_by_cycles(order: Any) -> None:
    space = Space()
    a = space.atom(12)
    space.unify(a, deal(a, order))
    choices = pick(space, a, 0)
    kept = np.broadcast_to(keep_mask([a], choices), [12])
    assert np.array_equal(kept, kept[order])
    cycles, seen = 0, set()
    for start in range(12):
        cycles += start not in seen
        while start not in seen:
            seen.add(start)
            start = int(order[start])
    sizes = [1] * (cycles - sum(x.size for x in atoms(a))) + [x.size for x in atoms(a)]
    assert sum(sizes) == cycles


class Beside(torch.nn.Module):
    """Positions are dealt out inside heads, and whole heads go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(5, 24), torch.nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.up(x).view(2, 4, 6)
        dealt = heads.view(2, 4, 2, 3).transpose(2, 3).reshape(2, 4, 6)
        return self.down(dealt.reshape(2, 24))


def test_a_dim_beside_the_dealt_one_shrinks() -> None:
    torch.manual_seed(0)
    found = trace(Beside(), (torch.randn(2, 5),))
    solution = solve(found.graph, TABLE, rewire=True)
    assert solution.solver.gathers
    heads = next(g for g in solution.groups.values() if g.size == 4)
    choices = {heads.atom: Choice(np.array([True, False, True, False]))}
    assert prove(found, solution, choices).holds


# --- ShuffleNet ---------------------------------------------------------------------------------


def test_shufflenet() -> None:
    """Gathers set every channel free that views tie or freeze, and the program carries them out."""
    module, inputs = models_zoo.load("shufflenet").build()
    found = trace(module, inputs)
    free, tied = (solve(found.graph, TABLE, rewire=rewire) for rewire in (True, False))
    slices = [sum(g.size for g in s.groups.values()) for s in (free, tied)]
    assert slices == [100, 74]
    assert {(w, why[0].split()[0:2][1]) for w, d, why in free.frozen() if d < 2} == {
        ("0.weight", "input"), ("11.weight", "output"), ("11.bias", "output")}
    rng = np.random.default_rng(1)
    choices = {g.atom: Choice(table_of(rng, g.shape, g.size // 2 + 1), g.outers)
               for g in free.groups.values()}
    assert prove(found, free, choices).holds
    want = run_pruned(found, free, choices, double=False)
    program = rewrite(found, free, choices)
    assert sum(v.numel() for v in program.state_dict.values()) < sum(
        v.numel() for v in found.program.state_dict.values())
    assert [name for name in program.constants if name.startswith("index_of_")]
    pruned = Rewritten(program)
    assert runs_like(pruned, inputs, {}, want) == ""
    assert pruned(torch.cat([inputs[0]] * 2)).shape == (4, 7)  # the batch still varies
    assert runs_like(operate(found, module, free, choices), inputs, {}, want) != ""
