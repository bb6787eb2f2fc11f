"""The rooms of the code: no circle of imports between files, and what the core may not import.

Imports inside functions and for type checkers count like any other. Which room may import which is
a contract of import-linter in pyproject.toml (`make house`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("axes", "graph", "request", "rows", "groups", "plan")
FRAMEWORKS = ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "peft")


def modules() -> dict[str, Path]:
    """Every file of the package by its dotted name (the mapped folders by theirs)."""
    found = {}
    for base, prefix in (("spacompiler", ()), ("passes", ("spacompiler",)),
                         ("models_zoo", ("spacompiler",))):
        for path in (ROOT / base).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] not in (("spacompiler", "passes"), ("spacompiler", "models_zoo")):
                name = ".".join((*prefix, *parts)).removesuffix(".__init__")
                found[name] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name or "") of every import statement of a file, wherever it stands."""
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), name, path)


def imports_of(tree: ast.Module, name: str, path: Path) -> Iterator[tuple[str, str]]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1]
            module = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def drawing(found: dict[str, Path]) -> nx.DiGraph:
    """Files as nodes, imports as edges; the names at the top of the package stand for none."""
    graph = nx.DiGraph()
    graph.add_nodes_from(found)
    for name, path in found.items():
        for module, part in imports(name, path):
            target = f"{module}.{part}" if f"{module}.{part}" in found else module
            if target in found and target not in (name, "spacompiler"):
                graph.add_edge(name, target)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]


def test_no_files_import_each_other_in_a_circle():
    found = modules()
    assert len(found) > 150
    assert circles(drawing(found)) == []


def test_a_circle_would_be_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from .b import g\n")
    (tmp_path / "b.py").write_text("if TYPE_CHECKING:\n    from . import a\n")
    found = {f"spacompiler.x.{n}": tmp_path / f"{n}.py" for n in "ab"}
    assert circles(drawing(found)) == [["spacompiler.x.a", "spacompiler.x.b"]]


def test_the_core_names_no_framework():
    wrong = [(name, module) for name, path in modules().items() for module, _ in imports(name, path)
             if name.split(".")[1:2] and name.split(".")[1] in CORE
             and module.split(".")[0] in FRAMEWORKS]
    assert wrong == []


_FILES = {"onnx_backend", "deploy", "runtime", "artifact.onnx_files", "artifact.onnx_checks"}
SELDOM = {"networkx": {"cli.inspection", "groups.why"}, "onnx": _FILES, "onnx_ir": _FILES,
          "onnxruntime": _FILES, "spacompiler.onnx_backend": {*_FILES, "trials.file_measure"}}
"""What few compiles need, and the rooms or files that may import it before it is asked for."""


def at_once(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield (module, name or "") of what importing a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    return imports_of(tree, name, path)


def test_what_few_need_is_imported_when_it_is_asked_for():
    wrong = [(name, module) for name, path in modules().items()
             for module, _ in at_once(name, path) for seldom, homes in SELDOM.items()
             if f"{module}.".startswith(f"{seldom}.") and not any(
                 f"{name}.".startswith(f"spacompiler.{home}.") for home in homes)]
    assert wrong == []


@pytest.mark.parametrize("names", [
    [f"spacompiler.{room}" for room in CORE],
    ["spacompiler.store.place", "spacompiler.cli.main"],
])
def test_what_is_imported_for_help_brings_no_framework(names):
    code = (f"import sys\nfor n in {names!r}: __import__(n)\n"
            f"print([f for f in {FRAMEWORKS!r} if f in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_functions_keep_their_names_beside_rooms():
    """A room named like a function would hide it once the room is imported."""
    code = ("import importlib, pkgutil, spacompiler\n"
            "for m in pkgutil.walk_packages(spacompiler.__path__, 'spacompiler.'):\n"
            "    if '.passes' not in m.name and '.models_zoo' not in m.name and m.ispkg:\n"
            "        importlib.import_module(m.name)\n"
            "print([n for n in spacompiler.__all__ if not n.startswith('_')"
            " and not callable(getattr(spacompiler, n))])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# --- sizes --------------------------------------------------------------------------------------

TABLES = ("rows/aten_table.py", "rows/onnx_table.py", "rows/onnx_rows.py")
WIDE = {"api.py compile", "onnx_backend/run/kernels.py _run"}
"""Functions whose signature somebody else forces, or users read: CONTRIBUTING.md says why."""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Yield (name, function, whether it is public) of a file, methods and inner ones included."""
    def within(node: ast.AST, public: bool) -> Iterator[tuple[str, ast.FunctionDef, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                shown = public and not child.name.startswith("_")
                yield child.name, child, shown
                yield from within(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from within(child, public and not child.name.startswith("_"))
            else:
                yield from within(child, public)
    return within(ast.parse(path.read_text(encoding="utf-8")), True)


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    given = function.args
    return [a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)
            if a.arg not in ("self", "cls")]


def oversized(name: str, path: Path) -> Iterator[str]:
    """What in a file is longer or wider than it may be, or is not described."""
    where = str(path).partition("/spacompiler/")[2] or path.name
    if path.read_text(encoding="utf-8").count("\n") > 350 and where not in TABLES:
        yield f"{where}: over 350 lines"
    for called, function, public in functions(path):
        end = function.end_lineno or function.lineno
        if end - function.lineno + 1 > 40 and f"{where} {called}" not in WIDE:
            yield f"{where} {called}: over 40 lines"
        if len(parameters(function)) > 8 and f"{where} {called}" not in WIDE:
            yield f"{where} {called}: over 8 parameters"
        if public and not ast.get_docstring(function):
            yield f"{where} {called}: no docstring"


def code() -> dict[str, Path]:
    return {n: p for n, p in modules().items() if ".models_zoo" not in n}


def test_files_and_functions_are_of_a_size_and_described():
    assert [line for name, path in code().items() for line in oversized(name, path)] == []


def test_hardly_a_parameter_is_of_any_type():
    found = [f"{path}: {called}({a.arg})" for path in code().values()
             for called, function, _ in functions(path) for a in parameters(function)
             if isinstance(a.annotation, ast.Name) and a.annotation.id == "Any"]
    assert len(found) < 20, found


def test_what_is_too_large_would_be_seen(tmp_path):
    wide = ", ".join(f"a{i}: int" for i in range(9))
    body = "".join(f"    x = {i}\n" for i in range(40))
    (tmp_path / "m.py").write_text(f"def f({wide}) -> None:\n{body}" + "\n" * 330)
    assert [w.partition(": ")[2] for w in oversized("m", tmp_path / "m.py")] == [
        "over 350 lines", "over 40 lines", "over 8 parameters", "no docstring"]
