"""Whole random networks: whatever is pruned, the pruned network is the masked dense one."""

from __future__ import annotations

import numpy as np
import pytest
from commuting import choose, differences, quick_trace
from hypothesis import given, note, settings
from hypothesis import strategies as st
from networks import Net, network, networks
from words import WORDS

from spacompiler.axes.choices import Choice
from spacompiler.groups.solution import Solution, solve
from spacompiler.rows.aten_table import TABLE
from spacompiler.stages.tolerances import PROOF
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

GRAPHS, EXPORTED = 250, 20  # of a quick run; HYPOTHESIS_PROFILE=deep takes thousands


def check(found: Trace, seed: int, tries: int = 3) -> Solution:
    """Random choices of slices commute with every operator of a network."""
    solution, rng = solve(found.graph, TABLE, rewire=seed % 4 > 0), np.random.default_rng(seed)
    for _ in range(tries):
        choices = choose(solution, rng)
        wrong = {name: error for name, error in differences(found, solution, choices).items()
                 if not error <= PROOF.value}
        assert not wrong, [(a, c.table.astype(int).tolist()) for a, c in choices.items()]
    return solution


@settings(max_examples=GRAPHS * settings().max_examples // 50)
@given(networks(), st.integers(0, 9))
def test_random_networks(net: Net, seed: int) -> None:
    note(str(net))
    check(quick_trace(net, net.example()), seed)


@settings(max_examples=EXPORTED * settings().max_examples // 50)
@given(networks(), st.integers(0, 9))
def test_random_networks_as_exported(net: Net, seed: int) -> None:
    """The same through torch.export, with a batch whose size varies."""
    note(str(net))
    check(trace(net, (net.example(),)), seed)


# --- every word, alone and pruned ---------------------------------------------------------------

WHOLE = """
x: 2x6x4x4
a = conv(x, out=12, kernel=3, groups=1)
b = batch_norm(a)
c = shuffle(b, dim=1, groups=2)
d = act(c, kind='relu')
e = conv(d, out=12, kernel=1, groups=2)
f = join(e, b, how='add')
g = squeeze_excite(f)
h = reduce(g, dim=3, how='sum', keep=False)
i = permute(h, order=(2, 1))
j = linear(i, out=8)
k = attention(j, kv=2, times=2, dim=4, turn=True, how='gqa')
l = residual(k, j)
m = linear(l, out=8, like='j')
"""


def test_text_is_read_back() -> None:
    """A network is what it prints; `like` shares arrays."""
    with pytest.raises(ValueError, match="shape"):
        network(WHOLE)
    text = WHOLE.strip().removesuffix(", like='j')") + ")"
    net = network(text)
    assert str(net) == text
    assert len({line.word for line in net.lines} & set(WORDS)) == len(
        {line.word for line in net.lines})
    shared = network("x: 2x4\na = linear(x, out=4)\nb = linear(a, out=4, like='a')")
    assert {name for name, _ in shared.named_parameters()} == {
        "a_0", "a_1", "b_out_0", "b_out_1"}


def test_both_traces_solve_alike() -> None:
    net = network(WHOLE.strip().removesuffix(", like='j')") + ")")
    quick = solve(quick_trace(net, net.example()).graph, TABLE)
    exported = solve(trace(net, (net.example(),)).graph, TABLE)
    assert [(g.name, g.size, g.role) for g in quick.groups.values()] == [
        (g.name, g.size, g.role) for g in exported.groups.values()]
    assert len(quick.groups) > 6


def test_a_wrong_row_is_found() -> None:
    """The check fails where a row keeps the wrong half."""
    net = network("x: 2x4\na = linear(x, out=6)\nb = flip(a, dim=1)")
    table = type(TABLE)({**TABLE, "flip": lambda s, n: s.put(
        n.outputs[0], s.dims[next(n.refs())])})
    found = quick_trace(net, net.example())
    solution = solve(found.graph, table)
    kept = np.array([True, True, True, False, False, False])
    errors = differences(found, solution, {a.atom: Choice(kept) for a in
                                           solution.groups.values()})
    assert max(errors.values()) > PROOF.value
