"""What the solver makes of whole graphs, whatever their operators: tiny programs in text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from spacompiler.axes.expressions import atoms, product, reasons, show
from spacompiler.axes.space import Clash
from spacompiler.graph.ir import Graph, Node, Ref, Tensor
from spacompiler.groups.solution import Solution, solve
from spacompiler.rows import primitives as p
from spacompiler.rows.findings import Read
from spacompiler.rows.solver import OUTSIDE, Row, Solver


def first_only(s: Solver, n: Node) -> None:
    """Says nothing about the second result."""
    p.same(s, Node(n.name, n.op, n.args, {}, n.outputs[:1]))


def zeros(s: Solver, n: Node) -> None:
    s.put(n.outputs[0], list(map(s.space.atom, s.shape(n.outputs[0]))))


def clashes(s: Solver, n: Node) -> None:
    raise Clash("no common refinement")


TABLE: Mapping[str, Row] = {
    "linear": p.contract("... i, o i -> ... o"), "add": p.pointwise, "same": p.same,
    "split": first_only, "clash": clashes, "turned": p.contract("a b -> b a"),
    "merge": p.contract("a b -> (a b)"), "zeros": zeros,
}


def graph(text: str) -> Graph:
    """Lines `kind name shape [of array]`, `name shape[, ...] = op operand ...`, `out name ...`.

    A `?` behind a size: it varies between calls.
    """
    made = Graph()

    def tensor(name: str, sizes: str, kind: str = "value", weight: str | None = None) -> str:
        parts = sizes.split("x") if sizes != "-" else []
        varies = frozenset(d for d, part in enumerate(parts) if part.endswith("?"))
        made.tensors[name] = Tensor(name, tuple(int(part.rstrip("?")) for part in parts), "float",
                                    kind, weight, varies)
        return name

    for line in filter(None, map(str.strip, text.splitlines())):
        kind, _, rest = line.partition(" ")
        if kind == "out":
            made.outputs = rest.split()
        elif kind == "write":
            value, stored = rest.split()
            made.written[value] = stored
        elif "=" in line:
            results, (op, *refs) = line.split(" = ")[0], line.split(" = ")[1].split()
            outs = tuple(tensor(*part.split()) for part in results.split(", "))
            made.nodes.append(Node(outs[0], op, tuple(map(Ref, refs)), {}, outs, f"layer.{op}"))
        else:
            name, sizes, *array = rest.split()
            stored = kind in ("parameter", "buffer", "outside")
            tensor(name, sizes, kind, (array or [name])[0] if stored else None)
            if kind == "input":
                made.inputs.append(name)
    return made


TWO = """
    input x 2x3
    parameter a 4x3
    parameter b 5x4
    h 2x4 = linear x a
"""

# program; what some tensors' dimensions are; a reason of one of them
PROGRAMS: dict[str, tuple[str, dict[str, str], tuple[str, str]]] = {
    "inputs and results stay": (
        TWO + "y 2x5 = linear h b\n out y",
        {"x": "2! 3!", "a": "4 3!", "b": "5! 4", "h": "2! 4", "y": "2! 5!"},
        ("y", "model output y")),
    "inputs say so": (TWO + "out h", {"a": "4! 3!"}, ("x", "model input x")),
    "constants stay": (
        "constant c 4\n parameter a 4\n y 4 = add a c\n out",
        {"a": "4!"}, ("a", "model constant c")),
    "without results all is used": (TWO + "out", {"a": "4 3!", "b": "5! 4!", "h": "2! 4"},
                                    ("b", "not used")),
    "what is not used stays": (
        "input x 2x3\n parameter a 4x3\n parameter b 4x4\n h 2x4 = linear x a\n"
        "z 2x4 = linear h b\n y 2x4 = same h\n w 2x4 = linear y b\n out y",
        {"b": "4! 4!"}, ("b", "not used on the example inputs")),
    "a buffer that is not used": (
        "input x 2x3\n parameter a 4x3\n buffer m 7\n h 2x4 = linear x a\n out h",
        {"m": "7"}, ("h", "model output")),
    "a result without entries uses nothing": (
        "input x 2x3\n parameter a 4x3\n parameter b 5x4\n parameter c 6x4\n h 2x4 = linear x a\n"
        "y 2x5 = linear h b\n z 0x6 = empty h c\n out y z",
        {"c": "6! 4!"}, ("c", "not used")),
    "nor does what follows from nothing": (
        "input x 2x3\n parameter a 4x3\n parameter c 6x4\n h 2x4 = linear x a\n"
        "e 0x4 = empty h\n z 0x6 = linear e c\n t 6 = empty z\n out h t",
        {"c": "6! 4!"}, ("c", "not used")),
    "an array under two names is one": (
        "input x 2x3\n parameter a 4x3 tied\n parameter b 4x3 tied\n h 2x4 = linear x a\n"
        "y 3x4 = turned b\n out",
        {"a": "4 3!", "b": "4 3!", "y": "3! 4"}, ("b", "model input x")),
    "used outside": (
        TWO.replace("parameter a", "outside a") + "y 2x5 = linear h b\n out",
        {"a": "4! 3!", "b": "5 4!"}, ("a", OUTSIDE)),
    "written back": (
        "input x 2x3\n parameter a 4x3\n buffer m 2x4\n h 2x4 = linear x a\n write h m",
        {"m": "2! 4", "h": "2! 4"}, ("m", "model input x")),
    "written back with another order": (
        "input x 3x3\n parameter a 4x3\n buffer m 4x3\n h 3x4 = linear x a\n"
        "t 4x3 = turned h\n write t m",
        {"m": "4 3!", "t": "4 3!"}, ("m", "model input x")),
    "a by-product that nothing reads": (
        "parameter a 4\n b 4, c 4 = split a\n d 4 = same b\n out",
        {"a": "4", "b": "4", "c": "4!"}, ("c", "by-product of split")),
    "a by-product that is read": (
        "parameter a 4\n b 4, c 4 = split a\n d 4 = same c\n out",
        {"a": "4!", "b": "4!", "d": "4!"}, ("a", "by-products of split in layer.split are read")),
    "a by-product that is a result": (
        "parameter a 4\n b 4, c 4 = split a\n out c",
        {"a": "4!"}, ("a", "by-products of split")),
    "sizes that vary stay": (
        "parameter a 4x6\n b 4?x6 = same a\n out", {"a": "4! 6"}, ("a", "varies between calls")),
    "but a nest that varies is one of axes that may go": (
        "parameter a 4x6\n b 24? = merge a\n c 1 = zeros\n out c b", {"a": "4! 6!"},
        ("a", "model output b")),
    "what is frozen and varies keeps its reason": (
        "input x 4x6\n b 4?x6 = same x\n out", {"x": "4! 6!"}, ("x", "model input x")),
    "a constant that an unknown operator takes": (
        "input x 4\n z 4 = zeros\n b 4 = what z x\n parameter a 4\n c 4 = add a z\n out",
        {"z": "4!", "a": "4!"}, ("a", "computed without weights by what")),
    "an unknown operator": (
        "parameter a 4\n b 3x2 = what a\n c 3x2 = same b\n out",
        {"a": "4!", "c": "3! 2!"}, ("a", "unknown operator what in layer.what")),
    "a row that cannot": (
        "parameter a 4\n parameter b 4\n c 4 = clash a b\n out",
        {"a": "4!", "b": "4!", "c": "4!"}, ("b", "clash in layer.clash: no common refinement")),
    "a row that gives other sizes": (
        "parameter a 4\n b 3 = same a\n out", {"a": "4!", "b": "3!"},
        ("a", "the row gives (4,), the program (3,)")),
    "of another rank": (
        "parameter a 4\n b 4x1 = same a\n out", {"a": "4!", "b": "4! 1"}, ("b", "the program")),
}


def shown(solution: Solution, tensor: str) -> str:
    return " ".join(map(show, solution.solver.dims[tensor]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    text, want, (tensor, reason) = PROGRAMS[name]
    solution = solve(graph(text), TABLE)
    assert {t: shown(solution, t) for t in want} == want
    said = [why for e in solution.solver.dims[tensor] for why in reasons(e)]
    assert any(reason in why for why in said), said
    assert not ("model input" in reason and any("varies" in why for why in said))


@pytest.mark.parametrize("text, opaque", [
    ("parameter a 4\n b 4 = what a\n out", ["what"]),
    ("input x 4\n b 4 = what x\n out", []),  # computed from inputs alone: not worth a word
    ("input x 4\n z 4 = zeros\n b 4 = what x z\n out", []),
    ("z 4 = zeros\n b 4 = what z\n c 4 = what b\n out", []),
    ("input x 4\n b 4 = what x\n c 4 = other b\n parameter a 4\n d 4 = third a c\n out",
     ["third"]),
    ("parameter a 4\n b 4 = clash a\n c 4 = what b\n out", []),  # all is frozen already
    ("parameter a 4\n b 3 = what\n out", []),
    ("parameter a 4\n b 4 = same a\n c 4 = what b\n out", ["what"]),
])
def test_unknown_operators_are_listed_where_they_cost(text: str, opaque: list[str]) -> None:
    solver = solve(graph(text), TABLE).solver
    assert [node.op for node in solver.opaque] == opaque
    for node in solver.graph.nodes:
        if node.op not in TABLE and node.op not in opaque:
            assert "computed without weights by" in " ".join(
                why for out in node.outputs for e in solver.dims[out] for why in reasons(e))


def test_frozen_dimensions_are_those_that_could_have_shrunk() -> None:
    solution = solve(graph("parameter a 4x1x3\n parameter b 2\n c 4x1x3 = what a\n"
                           "d 2 = same b\n out"), TABLE)
    assert [(weight, d) for weight, d, _ in solution.frozen()] == [("a", 0), ("a", 2)]


def test_what_follows_from_arrays_alone_is_static() -> None:
    made = graph("input x 2x3\n parameter a 4x3\n b 3x4 = turned a\n c 4x3 = turned b\n"
                 "h 2x4 = linear x c\n e 1 = what\n out h")
    solve(made, TABLE)
    assert {t.name for t in made.tensors.values() if t.static} == {"a", "b", "c"}


def test_groups_of_a_nest_have_names_of_their_own() -> None:
    table = {**TABLE, "heads": p.contract("b (h d) -> b h d", h=2),
             "pairs": p.contract("b h d, b g d -> h g")}
    solution = solve(graph("input x 2x3\n parameter a 6x3\n h 2x6 = linear x a\n"
                           "k 2x2x3 = heads h\n s 2x2 = pairs k k\n out"), table)
    assert {name: g.size for name, g in solution.groups.items()} == {"a:0.0": 2, "a:0.1": 3}
    heads, dims = solution.groups.values()
    assert (heads.role, dims.role) == ("head", "head dim")
    assert [(r.node, r.dim, r.how) for r in dims.reads] == [("s", 2, "contract")] * 2


def nest(s: Solver, n: Node) -> None:
    """A nest whose inner axes are older than the outer ones."""
    inner, middle, outer = (s.space.atom(size) for size in (2, 3, 4))
    s.space.unify(s.dims["a"][0], product((outer, middle, inner)))
    s.put(n.outputs[0], (outer, middle, inner))


def test_outer_axes_stand_from_the_outside_in() -> None:
    solution = solve(graph("parameter a 24\n b 4x3x2 = nest a\n out"), {"nest": nest})
    assert [(g.size, g.shape) for g in solution.groups.values()] == [
        (4, (4,)), (3, (4, 3)), (2, (4, 3, 2))]


def test_reads_and_members() -> None:
    solution = solve(graph(TWO + "y 2x5 = linear h b\n out y"), TABLE)
    (group,) = solution.groups.values()
    assert [(m.weight, m.dim, m.role) for m in group.members] == [
        ("a", 0, "producer"), ("b", 1, "consumer")]
    assert group.reads == (Read("y", "h", 1, "contract"), Read("y", "b", 1, "contract"))
    assert (group.name, group.role, group.outers, group.approximate) == ("a:0", "channel", (), ())
    assert solution.solver.contractions[-1].macs == (
        *solution.solver.dims["y"], solution.solver.dims["h"][1])


def test_a_gather_takes_positions_of_one_dimension() -> None:
    """What is fibred along the dealt dimension is so under its own axes only."""
    solver = Solver(graph("parameter a 6x3\n b 4x3 = deal a\n out"), {
        "deal": lambda s, n: s.gather(n, "a", 0, np.array([5, 1, 2, 0]))})
    solver.solve()
    (gather,) = solver.gathers
    assert (gather.source, gather.result, gather.dim) == ("a", "b", 0)
    assert solver.dims["b"][1] is solver.dims["a"][1]
    assert set(atoms(solver.dims["b"][0])) <= set(atoms(solver.dims["a"][0]))
    (contraction,) = solver.contractions
    assert atoms(contraction.letters["dealt"]) == atoms(solver.dims["a"][0])
    assert len(contraction.operands) == 2 and contraction.macs == ()
