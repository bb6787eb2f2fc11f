"""Patterns: what parses, what does not, and how runs of dimensions align."""

from __future__ import annotations

import pytest

from spacompiler.axes.notation import align, parse


@pytest.mark.parametrize(("text", "inputs", "outputs", "consumed"), [
    ("... i, o i, o -> ... o", ["... i", "o i", "o"], ["... o"], "i"),
    ("b (g i) !*, (g o) i !* -> b (g o) !*", ["b g.i !*", "g.o i !*"], ["b g.o !*"], "i"),
    ("! h, ... -> ... h", ["! h", "..."], ["... h"], ""),
    ("i, i -> ", ["i", "i"], [""], "i"),
    ("(c r r) -> c, r", ["c.r.r"], ["c", "r"], ""),
])
def test_parse(text: str, inputs: list[str], outputs: list[str], consumed: str) -> None:
    pattern = parse(text)
    assert [" ".join(map(".".join, side)) .replace("....", "...") for side in pattern.inputs] \
        == inputs
    assert [" ".join(map(".".join, side)) for side in pattern.outputs] == outputs
    assert pattern.consumed == frozenset(consumed)
    assert parse(text) is pattern


@pytest.mark.parametrize("text", ["a b", "a ? -> a", "... a ... -> a", "... !* -> a", "(a -> a"])
def test_malformed(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(("text", "rank", "want"), [
    ("... i", 1, "i"), ("... i", 3, "...1 ...0 i"), ("b !* c", 4, "b ! ! c"), ("b c ...", 2, "b c"),
    ("b ... c", 4, "b ...1 ...0 c"),
])
def test_align(text: str, rank: int, want: str) -> None:
    terms = align(parse(f"{text} -> ").inputs[0], rank)
    assert " ".join("".join(term) for term in terms) == want


@pytest.mark.parametrize(("text", "rank"), [("a b", 3), ("a b", 1), ("a ... b", 1)])
def test_align_needs_room(text: str, rank: int) -> None:
    with pytest.raises(ValueError):
        align(parse(f"{text} -> ").inputs[0], rank)
