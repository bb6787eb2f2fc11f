"""Single steps towards a target: what they change is known exactly, and at a price that does not
grow with the network."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from spacompiler.axes.expressions import Atom
from spacompiler.groups.cost import Cost, Term
from spacompiler.groups.solution import Group
from spacompiler.plan.problem import Problem, Unit
from spacompiler.plan.settling import _Steps, refine


def stream(layers: int) -> Problem:
    """One stream of 8 channels that every layer reads and writes, each with a width of its own."""
    width = Atom(8, 0)
    inner = [Atom(6 + i % 5, i + 1) for i in range(layers)]
    groups = [Group(f"g{i}", atom, (), "channel") for i, atom in enumerate((width, *inner))]
    terms = [Term((width, atom), 1 + i % 3) for i, atom in enumerate(inner)] * 2
    terms += [Term((a, b)) for a, b in pairwise(inner)]
    cost = Cost(terms)
    units = tuple(Unit(g.name, (g,), tuple(range(1, g.size + 1)), np.zeros(g.size + 1))
                  for g in groups)
    return Problem(units, cost, cost.total * 0.61, cost.total)


def priced(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a term is evaluated from now on."""
    count = [0]
    value = Cost._value

    def counted(self: Cost, term: Any) -> int:
        count[0] += 1
        return value(self, term)

    monkeypatch.setattr(Cost, "_value", counted)
    return count


def test_what_each_step_changes_stays_exact_as_others_are_taken() -> None:
    problem = stream(12)
    steps = _Steps(problem, problem.full(), "")
    problem.price(problem.full())
    for which in (0, 6, 2, 0, 8, 9, 6, 1, 24):
        total = steps.take(which)
        assert total == problem.price(steps.kept)
        fresh = _Steps(problem, dict(steps.kept), "")
        assert steps.change == fresh.change
        assert steps.ordered == fresh.ordered


def test_a_step_of_one_layer_costs_the_same_in_a_deep_network(
        monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (10, 200):
        problem = stream(layers)
        steps = _Steps(problem, problem.full(), "")
        with monkeypatch.context() as patched:
            count = priced(problem, patched)
            steps.take(10)
        found.append(count[0])
    assert found[0] == found[1]


def test_settling_meets_the_target_by_steps_of_single_units() -> None:
    problem = stream(12)
    kept = refine(problem, problem.full())
    assert problem.met(kept)
    assert abs(problem.price(kept) - problem.target) <= 2
