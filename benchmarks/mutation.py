"""How many seeded faults in operator rows and in the axis algebra does the test suite catch?

    python benchmarks/mutation.py rows --count 80
    python benchmarks/mutation.py algebra --count 80

A fault (faults.py) is one small change of one function: a swapped pair of arguments, a comparison
turned, a number off by one, a statement that relates, freezes, reads or edits dropped, a letter
of a pattern exchanged, an operator moved to another row. The tests of these modules (`PARTS`) run
once in this process, which notes the lines that each reaches and keeps every trace in memory; of
random networks, and of tiny ones for brute force, there are `--networks` each (the suite draws
more). Then each fault is set in a child made by fork. There run the tests that look up an operator
whose row has changed, or that reach the changed function (those that reach the changed line first,
quick ones first), until one fails or `--budget` seconds are over.

A fault that no running code shows has not been set: it counts as survived.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from faults import MODULES, ROOT, Fault, faults, harmless, source
from hypothesis import Phase, settings

ALGEBRA = "axes space choices notation idioms groups slicing".split()
PARTS = {  # modules, and the files of their tests
    "algebra": (ALGEBRA, "test_axes test_notation test_idioms test_exact test_permutations "
                         "test_random_graphs test_labels test_groups test_solver test_slicing "
                         "test_rows"),
    "rows": ([m for m in MODULES if m not in ALGEBRA],
             "test_ops test_rows test_solver test_exact test_permutations test_groups"),
}
LEFT_OUT = """solving_is_fast random_networks the_algebra_and_the_marks commutes_with_programs
a_wrong_row every_row_matters shufflenet golden every_parameter every_operator
other_shapes""".split()
"""Of time alone, of tests themselves, too slow here, or done by `networks` and `marks`."""
GRAPHS, EXAMPLES = 60, 20
TIMES = 4.0
"""A child may take so many times what its tests take without a fault: then it is in a loop."""

TABLES = "frontends/aten"
PATHS = {str(ROOT / f"spacompiler/{module}.py"): module for module in MODULES}
Place = tuple[str, str | int]
"""A module, and a function, a line, or (of a table of rows) an operator that is looked up."""


@dataclass
class Check:
    """A test: `run` returns what failed or ""; `seconds` and `reached` places, faultless."""

    name: str
    run: Callable[[], str]
    seconds: float = 0.0
    reached: set[Place] = field(default_factory=set)


# --- what is run --------------------------------------------------------------------------------


def networks(count: int) -> Iterator[Check]:
    """Random networks, traced beforehand: slicing commutes."""
    import test_random_graphs as graphs
    from commuting import quick_trace
    from networks import SHAPES, drawn

    for i in range(count):
        net = drawn(SHAPES[i % len(SHAPES)], seeds(i, 8))
        yield _asserts(f"random network {i}", graphs.check, quick_trace(net, net.example()), i, 2)


def marks(count: int) -> Iterator[Check]:
    """Tiny networks, traced beforehand: brute force."""
    import test_labels as labels
    from commuting import quick_trace
    from networks import drawn

    for i in range(count):
        shape = labels.SHAPES[i % len(labels.SHAPES)]
        net = drawn(shape, seeds(i, 4), labels.TINY, (2, 3, 4))
        yield _asserts(f"marks of tiny network {i}", labels.compare,
                       quick_trace(net, net.example()), i)


def _asserts(name: str, test: Callable[..., Any], *args: Any) -> Check:
    from labels import Unsupported

    def run() -> str:
        try:
            test(*args)
        except Unsupported:
            pass
        except AssertionError:
            return name
        return ""

    return Check(name, run)


def seeds(i: int, count: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(2**32) for _ in range(count)]


def _item(item: pytest.Item) -> Check:
    from _pytest.runner import runtestprotocol

    def run() -> str:
        reports = runtestprotocol(item, log=False)
        return next((item.nodeid for r in reports if r.failed), "")

    return Check(item.nodeid, run)


def learn(check: Check) -> str:
    """Run a check without a fault: note its places and its seconds."""
    clear_caches()
    said = check.run()  # traces stay in memory
    clear_caches()

    def note(frame: FrameType, event: str, arg: object) -> Any:
        module = PATHS.get(frame.f_code.co_filename)
        if module is None:
            return None
        if event == "call":
            check.reached.add((module, frame.f_code.co_name))
            if module == TABLES and "op" in frame.f_locals:
                op = frame.f_locals["op"]
                check.reached |= {(module, op), (module, packet(op))}
        check.reached.add((module, frame.f_lineno))
        return note

    start = time.process_time()
    sys.settrace(note)
    try:
        said = said or check.run()
    finally:
        sys.settrace(None)
    check.seconds = time.process_time() - start
    return said


def clear_caches() -> None:
    """Forget what functions have returned, but for traces: these hold nothing of the algebra."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("spacompiler", "test_")):
            for value in list(vars(module).values()):
                clear = getattr(value, "cache_clear", None)
                kept = getattr(value, "__annotations__", {}).get("return")
                if clear is not None and kept != "Trace":
                    clear()


# --- setting a fault ----------------------------------------------------------------------------


def functions() -> list[FunctionType]:
    """Every function made from the sources of the modules, closures too."""
    return [f for f in gc.get_objects()
            if type(f) is FunctionType and f.__code__.co_filename in PATHS]


NOT_SET = "not set: nothing that runs is changed by it"


def set_fault(fault: Fault, running: list[FunctionType]) -> bool:
    """Change the running code: every function made from the changed source gets the new one, and
    a table its new rows. Returns whether there were any."""
    path = str(ROOT / f"spacompiler/{fault.module}.py")
    old = compile(ast.parse(source(fault.module)), path, "exec", dont_inherit=True)
    new = compile(fault.tree(), path, "exec", dont_inherit=True)
    replace = {a: b for a, b in _pairs(old, new) if a != b or a.co_code != b.co_code}
    rows = changed_rows(fault)
    table().update({op: row for op, row in rows.items() if row is not None})
    for op in [op for op, row in rows.items() if row is None]:
        del table()[op]
    changed = [f for f in running if f.__code__ in replace]
    for function in changed:
        function.__code__ = replace[function.__code__]
    if not changed and not rows:
        return False
    clear_caches()
    return True


def table() -> dict[str, Any]:
    return loaded(TABLES).TABLE  # type: ignore[no-any-return]


def loaded(module: str) -> Any:
    return sys.modules[f"spacompiler.{module.replace('/', '.')}"]


def packet(op: str) -> str:
    """`aten.add.Tensor` -> `add`, as tables name it."""
    return op.removeprefix("aten.").rsplit(".", 1)[0]


def changed_rows(fault: Fault) -> dict[str, Any]:
    """Operators whose row is another one with the fault; None for those that have lost theirs."""
    if fault.module != TABLES:
        return {}
    space = dict(vars(loaded(TABLES)))
    exec(compile(fault.tree(), "", "exec", dont_inherit=True), space)
    made, have = dict(space["TABLE"]), dict(table())
    return {op: made.get(op) for op in {**have, **made}
            if not _same(have.get(op), made.get(op))}


def _same(a: Any, b: Any) -> bool:
    """Are two rows made alike: the same code over the same values?"""
    if type(a) is not FunctionType or type(b) is not FunctionType or a is b:
        return bool(a is b or a == b)
    cells = zip(a.__closure__ or (), b.__closure__ or (), strict=True)
    return a.__code__ is b.__code__ and all(
        _same(x.cell_contents, y.cell_contents) for x, y in cells)


def _pairs(old: CodeType, new: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    yield old, new
    inner = ([c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new))
    for a, b in zip(*inner, strict=False):
        yield from _pairs(a, b)


# --- running the tests --------------------------------------------------------------------------


def caught(fault: Fault, checks: list[Check], running: list[FunctionType], budget: float) -> str:
    """Set a fault in a child and run checks there; return what caught it, or ""."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        limit = int(TIMES * min(budget, sum(c.seconds for c in checks))) + 10
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        try:
            said = _first(checks, budget) if set_fault(fault, running) else NOT_SET
        except BaseException as problem:
            said = f"{type(problem).__name__}: {problem}"
        os.write(write, said.encode()[:400])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return said or (f"stopped by signal {status}" if status else "")


def _first(checks: list[Check], budget: float) -> str:
    start = time.process_time()
    for check in checks:
        try:
            said = check.run()
        except Exception as problem:
            said = f"{check.name}: {type(problem).__name__} {problem}"
        if said or time.process_time() - start > budget:
            return said
    return ""


def reaching(fault: Fault, checks: list[Check]) -> list[Check]:
    """The checks that look up a changed row or run the changed function: those that run the
    changed line first, then those that take little and reach little."""
    try:
        rows = changed_rows(fault)
    except Exception:  # the table cannot even be made
        return checks
    places = {(fault.module, op) for op in rows} or {(fault.module, fault.function)}
    line = places if rows else {(fault.module, fault.line)}
    return sorted((c for c in checks if places & c.reached),
                  key=lambda c: (not line & c.reached, c.seconds * len(c.reached)))


class Run:
    """The run of all faults, in place of pytest's own loop over its items."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        start = time.process_time()
        count = self.given.networks
        checks = [*networks(count), *marks(count), *map(_item, session.items)]
        failed = [said for check in checks if (said := learn(check))]
        assert not failed, f"fails without a fault: {failed}"
        print(f"{len(checks)} tests, {sum(c.seconds for c in checks):.0f} s of CPU, learnt in "
              f"{time.process_time() - start:.0f} s", flush=True)
        running = functions()
        gc.collect()
        gc.freeze()
        gc.disable()
        self.faults(checks, running)
        return True

    def faults(self, checks: list[Check], running: list[FunctionType]) -> None:
        every = [f for f in faults() if f.module in self.given.modules.split()
                 and self.given.match in str(f)]
        live = [f for f in every if not harmless(f)]
        picked = random.Random(self.given.seed).sample(live, min(self.given.count, len(live)))
        print(f"{len(every)} faults in {self.given.modules}, {len(every) - len(live)} of them "
              f"harmless by name; {len(picked)} picked", flush=True)
        survivors = 0
        for i, fault in enumerate(picked):
            start = time.perf_counter()
            chosen = reaching(fault, checks)
            said = caught(fault, chosen, running, self.given.budget)
            survived = said in ("", NOT_SET)
            survivors += survived
            print(f"{i:4} {'SURVIVED' if survived else 'caught  '} "
                  f"{time.perf_counter() - start:5.1f}s {fault}  | "
                  f"{said[:70] or f'{len(chosen)} tests'}", flush=True)
        killed = len(picked) - survivors
        print(f"caught {killed} of {len(picked)}: {killed / max(len(picked), 1):.1%}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("part", choices=PARTS)
    options.add_argument("--count", type=int, default=80, help="faults to try")
    options.add_argument("--modules", help="only faults of these")
    options.add_argument("--files", help="the tests' files")
    options.add_argument("--networks", type=int, default=GRAPHS, help="random ones, and tiny ones")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--match", default="", help="only faults whose text holds this")
    options.add_argument("--budget", type=float, default=20.0, help="CPU seconds for each")
    given = options.parse_args()
    modules, given_files = PARTS[given.part]
    given.modules = given.modules or " ".join(modules)
    sys.path[:0] = [str(path) for path in sorted((ROOT / "tests").iterdir()) if path.is_dir()]
    settings.register_profile("few", deadline=None, derandomize=True, max_examples=EXAMPLES,
                              phases=[Phase.explicit, Phase.generate], database=None)
    os.environ["HYPOTHESIS_PROFILE"] = "few"
    skip = " and ".join(f"not {name}" for name in LEFT_OUT)
    files = [str(next((ROOT / "tests").rglob(f"{name}.py")))
             for name in (given.files or given_files).split()]
    code = pytest.main([*files, "-q", "-s", "-k", skip, "-p", "no:cacheprovider",
                        "--no-header", "-W", "ignore"], plugins=[Run(given)])
    sys.exit(code if code != pytest.ExitCode.NO_TESTS_COLLECTED else 0)


if __name__ == "__main__":
    main()
