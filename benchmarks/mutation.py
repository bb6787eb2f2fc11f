"""How many seeded faults in operator rows and in the axis algebra does the test suite catch?

    python benchmarks/mutation.py --count 160

A fault is one small change of one function: a swapped pair of arguments, a comparison turned, a
number off by one, a statement that relates, freezes, reads or edits dropped, a letter of a pattern
exchanged, an operator moved to another row. The fast tests (or fewer examples of them: rows of
operators, the algebra, random networks, brute force on tiny ones) run once in this process, which
leaves every trace in memory; then each fault is set in a child made by fork, and the tests run
there until one fails. Prints the share caught; survivors are marked.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import io
import itertools
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parents[1]
MODULES = """axes notation primitives shapes reductions solver groups slicing idioms
frontends/aten""".split()
TESTS = "test_axes test_notation test_idioms test_exact test_permutations test_groups".split()
SLOW = "solving_is_fast golden every_parameter every_operator shufflenet".split()
SECONDS = 60
GRAPHS, TINY = 60, 60


@dataclass(frozen=True)
class Fault:
    """One change of one module: the line, what is done, and how to make the changed tree."""

    module: str
    line: int
    what: str
    tree: Callable[[], ast.Module]

    def __str__(self) -> str:
        source = (ROOT / f"spacompiler/{self.module}.py").read_text().splitlines()
        return f"{self.module}:{self.line} {self.what:28} {source[self.line - 1].strip()[:80]}"


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
            yield f"number {step:+d}", _set("value", node.value + step)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "->" in node.value:
        for text in _patterns(node.value):
            yield f"pattern {text}"[:40], _set("value", text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not dropped", lambda n: n.operand  # type: ignore[attr-defined]
    if isinstance(node, ast.Call) and len(node.args) == 2 and not any(
            isinstance(a, (ast.Starred, ast.GeneratorExp)) for a in node.args):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(
            node.func, "id", "")
        if name not in ("isinstance", "relate", "getattr", "Clash"):  # relate is symmetric
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
        tree = ast.parse((ROOT / f"spacompiler/{module}.py").read_text())
        sites = list(_sites(tree, inside=module.startswith("frontends")))
        for position, node in sites:
            for what, change in changes(node):
                found.append(Fault(module, node.lineno, what,  # type: ignore[attr-defined]
                                   partial(_changed, tree, position, change)))
    return [*found, *moved_rows()]


def _sites(tree: ast.Module, inside: bool) -> Iterator[tuple[int, ast.AST]]:
    """Positions (in walking order) of nodes inside functions, or anywhere in a table."""
    bodies = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)
              for part in f.body for n in ast.walk(part)}
    skipped = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.Raise, ast.JoinedStr))
               or (isinstance(f, ast.Expr) and isinstance(f.value, ast.Constant))
               or (isinstance(f, ast.FunctionDef) and f.name in (
                   "__str__", "show", "reasons", "title", "why", "coupling", "network",
                   "to_networkx", "__repr__"))
               for n in ast.walk(f)}
    for position, node in enumerate(ast.walk(tree)):
        if id(node) not in skipped and (inside or id(node) in bodies) and hasattr(node, "lineno"):
            yield position, node


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
    tree = ast.parse((ROOT / "spacompiler/frontends/aten.py").read_text())
    for op in "softmax cumsum sort topk flip mean amax var tril index_select group_norm".split():
        yield Fault("frontends/aten", 1, f"{op} element by element", partial(_moved, tree, op))


def _moved(tree: ast.Module, op: str) -> ast.Module:
    made = copy.deepcopy(tree)
    made.body.append(ast.parse(f"TABLE[{op!r}] = p.pointwise").body[0])
    return made


# --- setting one --------------------------------------------------------------------------------


def set_fault(fault: Fault) -> None:
    """Change the running code: every function made from the changed source gets the new one."""
    path = str(ROOT / f"spacompiler/{fault.module}.py")
    name = f"spacompiler.{fault.module.replace('/', '.')}"
    module = sys.modules[name]
    if fault.module.startswith("frontends"):
        space = dict(vars(module))
        exec(compile(fault.tree(), path, "exec"), space)
        module.TABLE.clear()  # type: ignore[attr-defined]
        module.TABLE.update(space["TABLE"])  # type: ignore[attr-defined]
    else:
        old = compile(ast.parse(Path(path).read_text()), path, "exec", dont_inherit=True)
        new = compile(fault.tree(), path, "exec", dont_inherit=True)
        replace = {a: b for a, b in _pairs(old, new) if a != b or a.co_code != b.co_code}
        for found in gc.get_objects():
            if isinstance(found, FunctionType) and found.__code__ in replace:
                found.__code__ = replace[found.__code__]
    sys.modules["spacompiler.notation"].parse.cache_clear()  # type: ignore[attr-defined]


def _pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    yield old, new
    inner = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new))
    for a, b in zip(*inner, strict=False):
        yield from _pairs(a, b)


# --- running the tests --------------------------------------------------------------------------


class Suite:
    """The fast tests, with every trace in memory: what they say is the first failure, or ""."""

    def __init__(self) -> None:
        import test_labels
        import test_ops
        import test_random_graphs
        from commuting import quick_trace
        from networks import SHAPES, drawn

        self.ops, self.graphs, self.labels = test_ops, test_random_graphs, test_labels
        made = [drawn(SHAPES[i % len(SHAPES)], seeds(i, 8)) for i in range(GRAPHS)]
        self.traced = [quick_trace(net, net.example()) for net in made]
        shapes = test_labels.SHAPES
        made = [drawn(shapes[i % len(shapes)], seeds(i, 4), test_labels.TINY, (2, 3, 4))
                for i in range(TINY)]
        self.tiny = [quick_trace(net, net.example()) for net in made]

    def run(self, module: str) -> str:
        parts = [self.units, self.operators, self.networks, self.marks]
        if module not in ("axes", "notation"):
            parts = [*parts[1:], parts[0]]
        return next((said for part in parts if (said := part())), "")

    def operators(self) -> str:
        """Every row of the table: what may shrink, and that slicing commutes."""
        t = self.ops
        for case in t.CASES:
            solution = t.solved(case)
            if t.free_dims(solution) != case.free:
                return f"free dimensions of {case}"
            for choices in t.tried(case, solution)[:3]:
                errors = t.differences(t.traced(case), solution, choices, case.random)
                if not max(errors.values(), default=0.0) <= t.TOLERANCE:
                    return f"slicing {case}"
        return ""

    def networks(self) -> str:
        for i, found in enumerate(self.traced):
            try:
                self.graphs.check(found, i, 2)
            except AssertionError:
                return f"random network {i}"
        return ""

    def marks(self) -> str:
        """Tiny networks against brute force."""
        for i, found in enumerate(self.tiny):
            try:
                self.labels.compare(found, i)
            except self.labels.Unsupported:
                continue
            except AssertionError:
                return f"marks of tiny network {i}"
        return ""

    def units(self) -> str:
        import pytest
        from hypothesis import settings

        settings.register_profile("few", settings.get_profile("ci"), max_examples=25,
                                  database=None)
        settings.load_profile("few")
        skip = " and ".join(f"not {name}" for name in SLOW)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            files = [str(ROOT / f"tests/{test}.py") for test in TESTS]
            code = pytest.main([*files, "-x", "-q", "-k", skip, "-p", "no:cacheprovider",
                                "--no-header", "--tb=no", "-W", "ignore"])
        rows = [r for r in said.getvalue().splitlines() if r.startswith(("FAILED", "ERROR"))]
        return "" if not code else rows[0] if rows else f"pytest: {code}"


def seeds(i: int, count: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(2**32) for _ in range(count)]


def caught(fault: Fault, suite: Suite) -> str:
    """Set a fault in a child and run the tests there; return what caught it, or ""."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        said = ""
        try:
            set_fault(fault)
            said = suite.run(fault.module)
        except BaseException as problem:
            said = f"{type(problem).__name__}: {problem}"
        os.write(write, said.encode()[:400])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or (f"killed by signal {status}" if status else "")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=160, help="faults to try")
    options.add_argument("--part", default="0/1", help="i/n: the i-th of n parts of them")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--match", default="", help="only faults whose text holds this")
    given = options.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    every = [f for f in faults() if given.match in str(f)]
    picked = random.Random(given.seed).sample(every, min(given.count, len(every)))
    part, parts = map(int, given.part.split("/"))
    picked = picked[part::parts]
    print(f"{len(picked)} of {len(every)} faults", flush=True)
    suite = Suite()
    assert not (said := suite.run("")), f"the suite fails without a fault: {said}"
    survivors = []
    for i, fault in enumerate(picked):
        start = time.perf_counter()
        said = caught(fault, suite)
        print(f"{i:4} {'caught  ' if said else 'SURVIVED'} {time.perf_counter() - start:5.1f}s "
              f"{fault}  | {said[:70]}", flush=True)
        if not said:
            survivors.append(fault)
    share = 1 - len(survivors) / len(picked)
    print(f"caught {len(picked) - len(survivors)} of {len(picked)}: {share:.1%}")


if __name__ == "__main__":
    main()
