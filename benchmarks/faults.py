"""Faults: small changes of one function of the axis algebra or of an operator's row."""

from __future__ import annotations

import ast
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = """axes space choices notation primitives shapes reductions recurrent writes solver
groups slicing idioms frontends/aten""".split()


@dataclass(frozen=True)
class Fault:
    """One change of one module: where, what is done, and how to make the changed tree."""

    module: str
    function: str
    line: int
    what: str
    tree: Callable[[], ast.Module]

    @property
    def source(self) -> str:
        return source(self.module).splitlines()[self.line - 1].strip()

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.what:28} {self.source[:80]}"


@cache
def source(module: str) -> str:
    return (ROOT / f"spacompiler/{module}.py").read_text()


# --- kinds of faults ----------------------------------------------------------------------------

TURNED: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
DROPPED = """relate freeze read edit put append extend update unify bind _bind _meet
relate_pattern give_up emit_fixed add pop insert pointwise _finish _narrow
_narrow_by_letters""".split()
SYMMETRIC = "isinstance getattr Clash relate unify _freeze_with min max minimum array_equal".split()
"""Calls whose arguments may change places: those of errors, or of what is symmetric."""
Change = tuple[str, Callable[[ast.AST], ast.AST | None]]


def _set(name: str, value: object) -> Callable[[ast.AST], ast.AST]:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, name, value)
        return node

    return change


def changes(node: ast.AST) -> Iterator[Change]:
    """Every fault that a syntax node could have."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
        yield "comparison turned", _set("ops", [TURNED[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in TURNED:
        yield "operator turned", _set("op", TURNED[type(node.op)]())
    if isinstance(node, ast.Constant) and type(node.value) is int:
        for step in (1, -1):
            yield f"number {node.value} -> {node.value + step}", _set("value", node.value + step)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "->" in node.value:
        for text in _patterns(node.value):
            yield f"pattern {text}"[:40], _set("value", text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda n: n.operand  # type: ignore[attr-defined]
    if isinstance(node, ast.Call) and len(node.args) == 2 and not any(
            isinstance(a, (ast.Starred, ast.GeneratorExp)) for a in node.args):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
            node.func, "id", "")
        if name not in SYMMETRIC and ast.dump(node.args[0]) != ast.dump(node.args[1]):
            yield "arguments swapped", _set("args", node.args[::-1])
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        called = node.value.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if name in DROPPED:
            yield f"{name} dropped", lambda n: ast.copy_location(ast.Pass(), n)
    if isinstance(node, ast.If):
        for value in (True, False):
            yield f"condition {value}", _set("test", ast.Constant(value))
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        yield "results swapped", _set("value", ast.Tuple(node.value.elts[::-1], ast.Load()))


def _patterns(text: str) -> Iterator[str]:
    """A pattern with two letters exchanged on one side of one operand or result."""
    left, _, right = text.partition("->")
    sides = [*left.split(","), right]
    for i, side in enumerate(sides):
        letters = sorted({c for c in side if c.isalpha()})
        for a, b in itertools.pairwise(letters):
            swapped = side.translate(str.maketrans({a: b, b: a}))
            made = [*sides[:i], swapped, *sides[i + 1 :]]
            yield ",".join(made[:-1]) + "->" + made[-1]


def faults() -> list[Fault]:
    """All faults of all modules, in a stable order."""
    found = []
    for module in MODULES:
        tree = ast.parse(source(module))
        only = {id(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript)
                and getattr(n.value, "attr", "") == "outputs"}
        for position, node, function in _sites(tree, inside=module.startswith("frontends")):
            for what, change in changes(node):
                if id(node) in only and what == "number 0 -> -1":
                    continue  # the last result of an operator that has one
                found.append(Fault(module, function, node.lineno, what,  # type: ignore
                                   partial(_changed, tree, position, change)))
    return [*found, *moved_rows()]


TEXTS = "__str__ __repr__ show reasons title why coupling network to_networkx".split()
"""Functions whose results are read by people only."""


def _sites(tree: ast.Module, inside: bool) -> Iterator[tuple[int, ast.AST, str]]:
    """Positions (in walking order) of nodes inside functions, or anywhere in a table.

    What an error or a text says, and assertions, are no behaviour.
    """
    owner = {id(n): f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
             for part in f.body for n in ast.walk(part)}
    skipped = {id(n) for f in ast.walk(tree)
               if isinstance(f, (ast.Raise, ast.JoinedStr, ast.Assert))
               or (isinstance(f, ast.Expr) and isinstance(f.value, ast.Constant))
               or (isinstance(f, ast.FunctionDef) and f.name in TEXTS) for n in ast.walk(f)}
    for position, node in enumerate(ast.walk(tree)):
        if id(node) not in skipped and (inside or id(node) in owner) and hasattr(node, "lineno"):
            yield position, node, owner.get(id(node), "")


def _changed(tree: ast.Module, position: int,
             change: Callable[[ast.AST], ast.AST | None]) -> ast.Module:
    made = copy.deepcopy(tree)
    target = next(n for i, n in enumerate(ast.walk(made)) if i == position)

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return change(node) if node is target else self.generic_visit(node)  # type: ignore

    return ast.fix_missing_locations(Replace().visit(made))


def moved_rows() -> Iterator[Fault]:
    """Operators that mix positions, moved to the row of those that do not."""
    tree = ast.parse(source("frontends/aten"))
    for op in "softmax cumsum sort topk flip mean amax var tril index_select group_norm".split():
        yield Fault("frontends/aten", "", 1, f"{op} element by element",
                    partial(_moved, tree, op))


def _moved(tree: ast.Module, op: str) -> ast.Module:
    made = copy.deepcopy(tree)
    made.body.append(ast.parse(f"TABLE[{op!r}] = p.pointwise").body[0])
    return made


# --- faults that change nothing -----------------------------------------------------------------

HARMLESS: dict[tuple[str, str, str], str] = {
    ("space", "return concat(outer for outer, _ in pairs), pairs[0][1]", "number 0"):
        "the inner axes have just been unified",
    ("space", "if e.order is not None:", "condition True"):
        "the way of dealt axes does for others too, slower",
    ("space", "if total.order is not None or (isinstance(other", "condition True"):
        "the way of dealt axes does for others too, slower",
    ("axes", "parts[inner].size, -1)", "number 1 -> 2"): "numpy infers any negative size",
    ("idioms", "return users[0] if len(users) == 1", "number 0 -> -1"): "there is one user",
    ("idioms", "if count < 2", "number 2 -> 1"): "one factor has one order",
    ("idioms", "(a, b) in enumerate(zip(old, new", "arguments swapped"):
        "whether two sizes differ is symmetric",
    ("shapes", "for e, o in zip(made, s.dims[other]", "arguments swapped"):
        "relating is symmetric",
    ("writes", "enumerate(zip(x, ", "arguments swapped"): "relating is symmetric",
    ("reductions", "zip(dims[-width:], s.dims[ref]", "arguments swapped"):
        "relating is symmetric",
    ("solver", "zip(self.dims[value], self.dims[stored_in]", "arguments swapped"):
        "relating is symmetric",
    ("shapes", "made = list(parts[0])", "number 0"): "parts agree in the other dimensions",
    ("shapes", "if have < want:", "comparison turned"): "they differ here",
    ("writes", "for a in n.args[3:]", "number 3 -> 2"): "the index agrees with itself",
    ("reductions", "in filter(None, operands(n)[2:])", "number 2 -> 1"):
        "the second operand is no tensor",
    ("reductions", 'n.kwargs.get("p", 2)', "number 2"): "any positive order reads alike",
    ("reductions", "if isinstance(dims, bool)", "condition False"):
        "the row then gives other sizes than the program, and all freezes too",
    ("primitives", "128 // int(digits)", "number 128 -> 129"): "rounded down it is the same",
    ("axes", "if not flat:", "condition False"):
        "an empty nest of its own has no atoms and size one: all treat it as ONE",
    ("space", "if a is b:", "condition False"): "part by part they are found equal, slower",
    ("axes", "return len(e.parts) > 1 or e.order is not None", "operator turned"):
        "what is made again is the same, slower",
    ("groups", "if not live:", "condition False"): "nothing narrows nothing",
    ("groups", "and not live[a] <= {*mentions[e]}", "comparison turned"):
        "a letter allows its own atoms",
}
"""(module, part of the line, start of the fault): why results are the same with it."""


def harmless(fault: Fault) -> str:
    """Why a fault cannot change a result, or "" if it could."""
    return next((why for (module, text, what), why in HARMLESS.items()
                 if module == fault.module and text in fault.source
                 and fault.what.startswith(what)), "")
