"""Every bound that a result is judged by stands in one table, with its reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import spacompiler
from spacompiler.stages.tolerances import FACTORS, TABLE

ROOT = Path(spacompiler.__file__).parent
NOT_ERRORS = {"MISS", "DAMPING", "1e-12",  # a share of a cost, a part of a diagonal, beside zero
              "FINEST", "DROPPED", "LEAST", "_TIME",  # shares of a width, chances, logs, units
              "RIDGE"}  # a part of a diagonal


def small(node: ast.expr) -> bool:
    """True for a number (or a product of numbers) that could bound an error."""
    return any(isinstance(n, ast.Constant) and isinstance(n.value, float)
               and 0 < n.value <= 1e-2 and str(n.value) not in NOT_ERRORS for n in ast.walk(node))


def bounds(tree: ast.Module) -> list[str]:
    """Bounds that a module has of its own: named ones, and numbers that it compares with."""
    found = [target.id for node in tree.body if isinstance(node, ast.Assign)
             for target in node.targets if isinstance(target, ast.Name) and (
                 (small(node.value) and target.id not in NOT_ERRORS) or
                 target.id.endswith(("TOLERANCE", "CONTROL", "NOISE")))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [ast.unparse(node) for side in (node.left, *node.comparators) if small(side)]
        elif isinstance(node, ast.keyword) and node.arg in ("atol", "rtol", "tolerance"):
            found += [ast.unparse(node)] if small(node.value) else []
        elif isinstance(node, ast.arguments):
            found += [ast.unparse(d) for d in node.defaults if small(d)]
    return found


def test_no_module_judges_results_by_a_bound_of_its_own():
    apart = {ROOT / "stages" / "tolerances.py", *(ROOT / "passes").rglob("*.py")}  # no judges
    own = {str(p): found for p in ROOT.rglob("*.py") if p not in apart
           if (found := bounds(ast.parse(p.read_text(encoding="utf-8"))))}
    assert own == {}


@pytest.mark.parametrize("text", [
    "TOLERANCE = 3", "RELOAD_TOLERANCE = 1e-6", "NEAR = 2 * 1e-4", "def f(e): return e < 1e-4",
    "f(a, b, atol=1e-5)", "def f(e, tolerance=1e-4): pass"])
def test_a_bound_elsewhere_is_seen(text):
    assert bounds(ast.parse(text))


def test_every_bound_says_what_it_bounds_and_why():
    for name, row in {**TABLE, **FACTORS}.items():
        assert row.value > 0 and row.bounds and row.why, name
    assert len({row.bounds for row in TABLE.values()}) == len(TABLE)
