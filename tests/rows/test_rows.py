"""What each row says about one node: axes, edits, reads, products. Text that a person can review.

A block of `golden/rows/aten.txt` starts with a call and its results' shapes; below stands what its
row says. An operand `x:3x4` is a stored array, `x~3x4` a value, `x!3x4` an input, whose axes are
frozen; `b` behind a shape marks truth values. Letters name atoms, `!` frozen ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest

from spacompiler.axes.expressions import Atom, Expr, atoms, show
from spacompiler.graph.ir import Graph, Node, Ref, Tensor
from spacompiler.groups.solution import solve
from spacompiler.rows import reductions
from spacompiler.rows.aten_table import TABLE
from spacompiler.rows.solver import Solver

GOLDEN = Path(__file__).parents[1] / "golden/rows/aten.txt"
BLOCKS = [block.strip().split("\n") for block in GOLDEN.read_text().split("\n\n")]
OPERAND = re.compile(r"\b([a-z]\w*)([:~!])([\dx]+|\(\))(b?)")
KINDS = {":": "parameter", "!": "input", "~": "value"}


def sizes(text: str) -> tuple[int, ...]:
    return () if text == "()" else tuple(map(int, text.split("x")))


def program(call: str) -> Graph:
    """One node on operands of its own."""
    graph = Graph()
    left, _, right = call.rpartition(" -> ")
    for name, mark, shape, boolean in OPERAND.findall(left):
        kind = KINDS[mark]
        graph.tensors[name] = Tensor(name, sizes(shape), "bool" if boolean else "float32", kind,
                                     name if kind == "parameter" else None)
        if kind == "value":
            graph.nodes.append(Node(name, "fresh", (), {}, (name,)))
    op, _, given = OPERAND.sub(r"\1", left).partition("(")
    names = {name: Ref(name) for name in graph.tensors}
    args, kwargs = eval(f"call({given}", {"call": lambda *a, **k: (a, k), **names})
    results = [f"y{i}" for i, _ in enumerate(right.split(", "))]
    for name, shape in zip(results, right.split(", "), strict=True):
        graph.tensors[name] = Tensor(name, sizes(shape), "float32")
    graph.nodes.append(Node("node", op.removeprefix("rewired "), args, kwargs, tuple(results)))
    return graph


def solved(call: str) -> Solver:
    table = type(TABLE)({**TABLE, "fresh": reductions.create(1)})
    return solve(program(call), table, rewire=call.startswith("rewired")).solver


def said(solver: Solver) -> list[str]:
    """The lines of a block, but for the call."""
    tensors = solver.graph.tensors
    names: dict[Atom, str] = {}

    def text(*exprs: Expr) -> str:
        for atom in (a for e in exprs for a in atoms(e)):
            names.setdefault(atom, f"{ascii_letters[len(names)]}{atom.size}")
        return ", ".join(show(e, names) for e in exprs)

    def path(edit: Any) -> str:
        return ".".join(map(str, edit.path))

    lines = [f"{t}: {text(*solver.dims[t])}" for t in tensors]
    lines += [f"{path(e)} = {e.value if e.value is not None else text(e.expr)}"
              f"{f', if {text(e.when)}' if e.when is not e.expr else ''}"
              for e in solver.edits if e.node == "node"]
    lines += [f"{r.how} {r.tensor}.{r.dim}" for r in solver.reads]
    lines += [f"{role}: {text(e)}" for e, role in solver.roles if atoms(e)]
    lines += [f"approximate: {text(e)}" for e, _ in solver.approximate]
    lines += [f"multiples of {k}: {text(e)}" for e, k in solver.multiples]
    lines += [f"macs: {text(*c.macs)}{f' x {c.factor}' if c.factor != 1 else ''}"
              for c in solver.contractions]
    lines += [f"clash: {clash}" for clash in solver.space.clashes]
    lines += [f"gather {g.source}.{g.dim} {g.index.tolist()}" for g in solver.gathers]
    return lines + [f"table {name}" for name in solver.tables]


def block(call: str) -> list[str]:
    return [call, *(f"    {line}".rstrip() for line in said(solved(call)))]


@pytest.mark.parametrize("i", range(len(BLOCKS)), ids=[lines[0] for lines in BLOCKS])
def test_rows_say(i: int, regen: bool) -> None:
    found = block(BLOCKS[i][0])
    if regen:
        BLOCKS[i] = found
        GOLDEN.write_text("\n\n".join(map("\n".join, BLOCKS)) + "\n")
    assert BLOCKS[i] == found
