"""The axis algebra: every solution ties what it must, keeps sizes, and never loses a reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from spacompiler.axes.choices import (
    Choice,
    Choices,
    coordinates,
    indices,
    keep_mask,
    kept_size,
    take,
)
from spacompiler.axes.expressions import (
    Atom,
    Expr,
    Prod,
    Sum,
    atoms,
    cells,
    concat,
    deal,
    is_frozen,
    product,
    reasons,
    resolve,
    show,
)
from spacompiler.axes.space import Clash, Space
from spacompiler.torch_backend.emit import slicer as slicing

# --- random expressions -------------------------------------------------------------------------

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12])
TREES = st.recursive(
    SIZES, lambda inner: st.tuples(st.sampled_from("*+"), st.lists(inner, min_size=2, max_size=3)),
    max_leaves=5)
SEEDS = st.integers(0, 2**16)


def build(space: Space, tree: Any) -> Expr:
    if isinstance(tree, int):
        return space.atom(tree)
    kind, parts = tree
    made = [build(space, part) for part in parts]
    return product(made) if kind == "*" else concat(made)


def small(tree: Any) -> Expr:
    e = build(Space(), tree)
    assume(1 < e.size <= 400)
    return e


def random_choices(exprs: Sequence[Expr], seed: int) -> Choices:
    rng = np.random.default_rng(seed)
    made: dict[Atom, Choice] = {}
    for atom in dict.fromkeys(a for e in exprs for a in atoms(e)):
        if not atom.frozen and rng.random() < 0.8:
            table = rng.random(atom.size) < 0.6
            table[rng.integers(atom.size)] = True
            made[atom] = Choice(table)
    return made


def kept(e: Expr, choices: Choices) -> list[int]:
    return np.flatnonzero(np.broadcast_to(keep_mask([e], choices), [e.size])).tolist()


def well_formed(e: Expr) -> bool:
    """Sizes add up, and the normal form holds: flat, with cuts at the top."""
    e = resolve(e)
    if isinstance(e, Atom):
        return e.bound is None and e.size > 1
    sizes = [p.size for p in e.parts]
    total = int(np.prod(sizes)) if isinstance(e, Prod) else sum(sizes)
    flat = not any(type(p) is type(e) for p in e.parts)
    top = not (isinstance(e, Prod) and e.parts and isinstance(e.parts[0], Sum))
    return total == e.size and flat and top and all(map(well_formed, e.parts))


@given(TREES, SEEDS)
def test_sizes_follow_masks(tree: Any, seed: int) -> None:
    e = small(tree)
    choices = random_choices([e], seed)
    assert well_formed(e)
    assert len(kept(e, choices)) == kept_size(e, choices)


@given(TREES)
def test_resolve_is_idempotent(tree: Any) -> None:
    e = small(tree)
    assert show(resolve(e)) == show(resolve(resolve(e)))
    assert all(a.bound is None for a in atoms(e))


@given(TREES)
def test_every_position_has_its_coordinates(tree: Any) -> None:
    """Two positions with equal coordinates do not exist, except along parts of size one."""
    e = small(tree)
    found = coordinates(e)
    assume(found and all(p.size > 1 for p in leaves(e)))
    for atom, at in found:
        assert at.shape == (e.size,)
        assert set(at) - {-1} == set(range(atom.size))
    assert len(set(zip(*(at.tolist() for _, at in found), strict=True))) == e.size


def places(e: Expr) -> list[set[tuple[int, int]]]:
    """At every position, the atoms that are there (by serial number), each with its coordinate."""
    found = [(atom.serial, at) for atom, at in coordinates(e)]
    return [{(serial, int(at[p])) for serial, at in found if at[p] >= 0} for p in range(e.size)]


@given(TREES, SEEDS)
def test_cells_make_up_a_dimension(tree: Any, seed: int) -> None:
    e = small(tree)
    e = deal(e, np.random.default_rng(seed).permutation(e.size)) if seed % 2 else e
    whole, seen = places(e), []
    for cell, at in cells(e):
        assert cell.size == len(at) and not any(isinstance(a, Sum) for a in leaves(cell))
        assert places(cell) == [whole[p] for p in at]
        seen.extend(at)
    assert sorted(seen) == list(range(e.size))


@pytest.mark.parametrize("nest_first", [True, False])
@pytest.mark.parametrize("dealt", [True, False])
def test_a_nest_and_a_concatenation_in_another_order(nest_first: bool, dealt: bool) -> None:
    """Each column of a nest of two rows is a part of its own: they agree at every position."""
    space, order = Space(), np.array([0, 2, 3, 1, 4, 5])
    nest = product((space.atom(2), space.atom(3)))
    parts = concat((space.atom(2), space.atom(4)))
    one, two = (nest, deal(parts, order)) if dealt else (deal(nest, np.argsort(order)), parts)
    space.unify(*((one, two) if nest_first else (two, one)))
    assert places(one) == places(two) and not is_frozen(one)
    assert len(atoms(one)) == 2


def leaves(e: Expr) -> list[Expr]:
    e = resolve(e)
    return [e] if isinstance(e, Atom) or not e.parts else [q for p in e.parts for q in leaves(p)]


# --- factor, split, unify -----------------------------------------------------------------------


@given(TREES, st.sampled_from([2, 3, 4, 6, 8, 12]), SEEDS)
def test_factor_is_a_reshape(tree: Any, k: int, seed: int) -> None:
    space = Space()
    e = build(space, tree)
    assume(1 < e.size <= 400 and e.size % k == 0)
    try:
        outer, inner = space.factor(e, k)
    except Clash:
        assume(False)
    assert (outer.size, inner.size) == (e.size // k, k)
    choices = random_choices([e], seed)
    array = np.arange(e.size)
    want = take(array, [e], choices).reshape(kept_size(outer, choices), kept_size(inner, choices))
    assert np.array_equal(take(array.reshape(outer.size, k), [outer, inner], choices), want)


@given(TREES, st.integers(1, 399), SEEDS)
def test_split_is_a_cut(tree: Any, p: int, seed: int) -> None:
    space = Space()
    e = build(space, tree)
    assume(1 < e.size <= 400)
    p = 1 + p % (e.size - 1) if e.size > 2 else 1
    try:
        left, right = space.split(e, p)
    except Clash:
        assume(False)
    assert (left.size, right.size) == (p, e.size - p)
    choices = random_choices([e], seed)
    array = np.arange(e.size)
    both = [take(array[:p], [left], choices), take(array[p:], [right], choices)]
    assert np.array_equal(np.concatenate(both), take(array, [e], choices))
    assert show(concat((left, right))) == show(e)


@given(TREES, TREES, SEEDS)
def test_unified_expressions_keep_the_same_positions(a: Any, b: Any, seed: int) -> None:
    space = Space()
    one, two = build(space, a), build(space, b)
    assume(1 < one.size <= 400)
    if one.size != two.size:  # make them fit: a tail for the shorter one
        short, long = sorted((one, two), key=lambda e: e.size)
        assume(long.size <= 400)
        one, two = concat((short, space.atom(long.size - short.size))), long
    try:
        space.unify(one, two)
    except Clash:
        assume(False)
    assert well_formed(one) and well_formed(two)
    for more in range(4):
        choices = random_choices([one, two], seed + more)
        assert kept(one, choices) == kept(two, choices)
    before = show(one), show(two)
    space.unify(one, two)  # a second time changes nothing
    assert (show(one), show(two)) == before


@given(TREES, TREES)
def test_a_clash_freezes_both_sides(a: Any, b: Any) -> None:
    space = Space()
    one, two = build(space, a), build(space, b)
    space.relate(one, two, "here")
    if space.clashes:
        for e in (one, two):
            assert is_frozen(e)
            assert not atoms(e) or any(why.startswith("here: ") for why in reasons(e))
    else:
        assert one.size == two.size


@given(TREES, st.lists(st.tuples(st.sampled_from("fsu"), st.integers(1, 50)), max_size=6), SEEDS)
def test_random_refinements_keep_the_whole(tree: Any, steps: list[tuple[str, int]],
                                           seed: int) -> None:
    """Whatever is asked of a dimension, its size stays and its parts stay consistent."""
    space = Space()
    e = build(space, tree)
    assume(1 < e.size <= 400)
    size, views = e.size, [e]
    for kind, k in steps:
        target = views[k % len(views)]
        try:
            if kind == "f":
                views.extend(space.factor(target, 1 + k % 6))
            elif kind == "s":
                views.extend(space.split(target, k % target.size))
            else:
                space.unify(target, views[k // 2 % len(views)])
        except Clash:
            pass
        assert e.size == size and all(map(well_formed, views))
        choices = random_choices(views, seed)
        assert all(len(kept(v, choices)) == kept_size(v, choices) for v in views)


# --- frozen axes --------------------------------------------------------------------------------


def frozen_then(act: Callable[[Space, Expr], Sequence[Expr]]) -> None:
    space = Space()
    e = space.atom(12)
    space.freeze(e, "why not")
    for part in act(space, e):
        assert is_frozen(part) and reasons(part) == ["why not"]


@pytest.mark.parametrize("act", [
    lambda s, e: s.factor(e, 4), lambda s, e: s.split(e, 5),
    lambda s, e: s.factor(s.split(e, 4)[1], 2),
    lambda s, e: s.split((s.factor(e, 4), e)[1], 5),
    lambda s, e: [s.carve((s.factor(e, 4), e)[1], np.array([0, 5]))],
    lambda s, e: [s.unify(e, other := s.atom(12)), other][1:],
    lambda s, e: [s.unify(other := s.atom(12), e), other][1:],
    lambda s, e: [s.unify(product((s.atom(3), inner := s.atom(4))), e), inner][1:],
    lambda s, e: [s.unify(e, concat((s.atom(5), tail := s.atom(7)))), tail][1:],
], ids="factor split both split-nest carve-nest unify unify-left bind-product bind-sum".split())
def test_reasons_travel(act: Any) -> None:
    frozen_then(act)


def test_reasons_of_both_sides_stay() -> None:
    space = Space()
    a, b = space.atom(6, "one"), space.atom(6, "other")
    space.unify(a, b)
    assert reasons(a) == reasons(b) == ["one", "other"]


def test_freezing_after_binding_reaches_both() -> None:
    space = Space()
    a, b = space.atom(6), product((space.atom(2), space.atom(3)))
    space.unify(a, b)
    space.freeze(a, "late")
    space.freeze(a, "late")
    assert [atom.reasons for atom in atoms(b)] == [("late",), ("late",)]


@pytest.mark.parametrize("sizes", [((2, 3), (3, 2)), ((3, 2), (2, 3))])
def test_frozen_structures_freeze_what_they_meet(sizes: Any) -> None:
    """Two frozen nests need no common refinement; a free one freezes with a frozen one."""
    space = Space()
    nest, other = (product((space.atom(a), space.atom(b))) for a, b in sizes)
    space.freeze(nest, "why not")
    space.unify(nest, other)
    assert is_frozen(other) and reasons(other) == ["why not"]


def test_an_axis_does_not_contain_itself() -> None:
    space = Space()
    long, short = space.atom(4), space.atom(2)
    space.unify(long, Sum((long,), 4))
    assert resolve(long) is long
    with pytest.raises(Clash, match="itself"):
        space.bind(long, Prod((short, long), 8))
    with pytest.raises(Clash, match="sizes"):
        space.unify(long, short)


@pytest.mark.parametrize("p", [0, 6, 7, -1])
def test_a_cut_lies_inside(p: int) -> None:
    space = Space()
    e = space.atom(6)
    with pytest.raises(Clash):
        space.split(e, p)
    assert isinstance(resolve(e), Atom)


# --- the structures of models -------------------------------------------------------------------


def grouped_heads(s: Space) -> list[Expr]:
    """Query heads in groups, halves rotated against each other; values; the output's columns."""
    q, k, v, o = s.atom(48), s.atom(16), s.atom(16), s.atom(48)
    (qh, qd), (kh, kd), (vh, _) = (s.factor(e, 8) for e in (q, k, v))
    s.unify(qd, kd)
    s.unify(*s.split(qd, 4))
    groups, repeats = s.factor(qh, 3)
    s.unify(groups, kh)
    s.unify(kh, vh)
    s.unify(o, product((groups, repeats, s.factor(v, 8)[1])))
    return [q, k, v, o]


def fused(s: Space) -> list[Expr]:
    """One weight for queries, keys and values, cut in three, then into heads."""
    w, parts = s.atom(24), []
    rest = w
    for _ in range(2):
        part, rest = s.split(rest, 8)
        parts.append(part)
    heads = [s.factor(part, 4) for part in (*parts, rest)]
    for h, d in heads[1:]:
        s.unify(heads[0][0], h)
        if d is heads[1][1]:
            s.unify(heads[0][1], d)
    return [w]


def per_head(s: Space) -> list[Expr]:
    """Heads outside, queries, keys and values inside each."""
    w = s.atom(24)
    _, inner = s.factor(w, 12)
    q, rest = s.split(inner, 4)
    k, _ = s.split(rest, 4)
    s.unify(q, k)
    return [w]


def grouped_convolution(s: Space) -> list[Expr]:
    """Groups shared by the input's and the output's channels."""
    c, o = s.atom(12), s.atom(20)
    (g, _), (h, _) = s.factor(c, 3), s.factor(o, 5)
    s.unify(g, h)
    return [c, o]


def flattened(s: Space) -> list[Expr]:
    """Channels in front of frozen positions."""
    columns = s.atom(4 * 9)
    s.unify(columns, product((s.atom(4), s.atom(3, "window"), s.atom(3, "window"))))
    return [columns]


def dense_block(s: Space) -> list[Expr]:
    """Inputs that grow by what each layer makes."""
    a, b, c = s.atom(6), s.atom(3), s.atom(2)
    first, second, third = s.atom(6), s.atom(9), s.atom(11)
    for columns, parts in ((first, (a,)), (second, (a, b)), (third, (a, b, c))):
        s.unify(columns, concat(parts))
    return [first, second, third]


def shuffled(s: Space) -> list[Expr]:
    """Two halves interleaved, then cut in half again."""
    x = s.atom(12)
    groups, inner = s.factor(x, 6)
    y = product((inner, groups))
    s.split(y, 6)
    return [x, y]


def blocks(s: Space) -> list[Expr]:
    """Pixels of a block beside channels: (c r r) and (h r)."""
    c, r, h = s.atom(3), s.atom(2), s.atom(5)
    rows, channels = s.atom(10), s.atom(12)
    s.unify(rows, product((h, r)))
    s.unify(channels, product((c, r, r)))
    return [rows, channels]


STRUCTURES: dict[str, tuple[Callable[[Space], list[Expr]], list[str], int]] = {
    "grouped heads": (grouped_heads, ["2*3*(4+4)", "2*(4+4)", "2*8", "2*3*8"], 4),
    "fused": (fused, ["2*4+2*4+2*4"], 3),
    "per head": (per_head, ["2*(4+4+4)"], 3),
    "grouped convolution": (grouped_convolution, ["4*3", "4*5"], 3),
    "flattened": (flattened, ["4*3!*3!"], 3),
    "dense block": (dense_block, ["6", "6+3", "6+3+2"], 3),
    "shuffled": (shuffled, ["2*(3+3)", "3*2+3*2"], 3),
    "blocks": (blocks, ["5*2", "3*2*2"], 3),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    make, want, count = STRUCTURES[name]
    exprs = make(Space())
    assert [show(e) for e in exprs] == want
    assert len({a for e in exprs for a in atoms(e)}) == count


@pytest.mark.parametrize(("sizes", "k", "want"), [
    ((2, 6), 3, ("2*2", "3")), ((4, 3), 6, ("2", "2*3")), ((5, 4), 4, ("5", "4")),
    ((2, 4, 3), 12, ("2", "4*3")),
])
def test_nests_factor_inside_their_parts(sizes: Any, k: int, want: tuple[str, str]) -> None:
    space = Space()
    outer, inner = space.factor(product(map(space.atom, sizes)), k)
    assert (show(outer), show(inner)) == want


def test_frozen_neighbours_factor_as_one() -> None:
    space = Space()
    nest = product((space.atom(4), space.atom(3, "why not"), space.atom(2, "why not")))
    outer, inner = space.factor(nest, 3)
    assert (show(outer), show(inner)) == ("4*2!", "3!")


def test_runs_of_small_terms_factor_together() -> None:
    """(a+b)+(c+d) viewed in two rows: each row is one sum, and the rows are alike."""
    space = Space()
    e = concat([space.atom(2), space.atom(3), space.atom(3), space.atom(2)])
    outer, inner = space.factor(e, 5)
    assert (show(outer), show(inner), show(e)) == ("1+1", "2+1+2", "2+1+2+2+1+2")


def test_arrays_are_cut_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space()
    dims = (space.atom(7), space.atom(3), space.atom(5))
    array, choices = np.arange(105).reshape(7, 3, 5), random_choices(dims, 3)
    assert len(choices) > 1
    for block in (1, 20, 1000):
        monkeypatch.setattr(slicing, "BLOCK", block)
        for some in (choices, dict([*choices.items()][:1]), {}):  # of many axes, of one, of none
            found = slicing.cut(torch.from_numpy(array), dims, some)
            assert np.array_equal(found.numpy(), take(array, dims, some))


# --- fibred choices -----------------------------------------------------------------------------


def heads_and_dims() -> tuple[Atom, Atom]:
    space = Space()
    heads, dims = space.factor(space.atom(6), 3)
    assert isinstance(heads, Atom) and isinstance(dims, Atom)
    return heads, dims


TABLE = np.array([[True, False, True], [False, True, True]])


def test_each_outer_slice_keeps_its_own() -> None:
    heads, dims = heads_and_dims()
    choices = {dims: Choice(TABLE, (heads,))}
    assert kept(product((heads, dims)), choices) == [0, 2, 4, 5]
    assert choices[dims].count == 2 and kept_size(product((heads, dims)), choices) == 4


def test_the_outer_atom_may_stand_in_another_dimension() -> None:
    heads, dims = heads_and_dims()
    choices = {dims: Choice(TABLE, (heads,))}
    array = np.arange(24).reshape(2, 4, 3)
    other = Space().atom(4)
    want = np.stack([array[0][:, [0, 2]], array[1][:, [1, 2]]])
    assert indices([heads, other, dims], choices) is None
    assert np.array_equal(take(array, [heads, other, dims], choices), want)


def test_outer_slices_go_with_their_inner_ones() -> None:
    heads, dims = heads_and_dims()
    choices = {dims: Choice(TABLE, (heads,)), heads: Choice(np.array([False, True]))}
    assert kept(product((heads, dims)), choices) == [4, 5]
    assert take(np.arange(6).reshape(2, 3), [heads, dims], choices).tolist() == [[4, 5]]


def test_a_fibred_atom_in_one_term_of_a_sum() -> None:
    heads, dims = heads_and_dims()
    e = concat((product((heads, dims)), Space().atom(2)))
    assert kept(e, {dims: Choice(TABLE, (heads,))}) == [0, 2, 4, 5, 6, 7]


def test_a_fibred_atom_in_both_terms_of_a_sum() -> None:
    heads, dims = heads_and_dims()
    e = concat([product((heads, dims))] * 2)
    assert kept(e, {dims: Choice(TABLE, (heads,))}) == [0, 2, 4, 5, 6, 8, 10, 11]


@given(st.integers(2, 4), st.integers(2, 4), st.integers(2, 5), SEEDS)
def test_fibred_views_commute_with_reshape(a: int, b: int, c: int, seed: int) -> None:
    """(a b c) cut flat, or as three dimensions, or with outer axes swapped: the same slices."""
    rng = np.random.default_rng(seed)
    one, two, three = (Atom(n, i) for i, n in enumerate((a, b, c)))
    count = int(rng.integers(1, c + 1))
    table = np.argsort(np.argsort(rng.random((a, b, c)), axis=-1), axis=-1) < count
    choices = {three: Choice(table, (one, two)), **random_choices([one, two], seed)}
    array = np.arange(a * b * c).reshape(a, b, c)
    want = take(array, [one, two, three], choices)
    assert want.shape == tuple(kept_size(e, choices) for e in (one, two, three))
    flat = take(array.reshape(-1), [product((one, two, three))], choices)
    assert np.array_equal(flat, want.reshape(-1))
    turned = take(array.transpose(1, 0, 2), [two, one, three], choices)
    assert np.array_equal(turned, want.transpose(1, 0, 2))
    nested = take(array.reshape(a * b, c), [product((one, two)), three], choices)
    assert np.array_equal(nested, want.reshape(-1, want.shape[-1]))
