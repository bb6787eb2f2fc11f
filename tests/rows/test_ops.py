"""Slicing commutes with every operator that the ATen table knows.

A case is one operator on parameters of its own, so that every dimension may shrink unless the
operator says otherwise. `free` says, per operand and dimension, which may: `*` slices can go,
`.` none can. For random kept slices, each value of the pruned program must be the kept part of
the same value of the masked dense one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers an operator; never while tracing)
from commuting import choose, differences, quick_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_case import Case, Module
from ops_cases import CASES
from ops_products import attention_cases, contraction_cases, convolution_cases
from ops_sized import other_sizes, sized_cases
from ops_wrong import FAULTS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spacompiler.axes.choices import Choices
from spacompiler.axes.expressions import is_frozen
from spacompiler.groups.cost import cost
from spacompiler.groups.solution import Solution, solve
from spacompiler.plan.legal import step as step_of
from spacompiler.rows.aten_table import TABLE
from spacompiler.rows.solver import Row
from spacompiler.stages.tolerances import PROOF
from spacompiler.torch_backend.emit.program import run_pruned
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace


@cache
def traced(case: Case) -> Trace:
    found = trace(Module(case), (torch.tensor(1.0),))
    found.graph.outputs = []  # results stay free
    return found


def solved(case: Case, table: Mapping[str, Row] = TABLE) -> Solution:
    return solve(traced(case).graph, table, rewire=True)


def free_dims(solution: Solution) -> str:
    """Which dimensions of the operands may shrink, in the notation of `Case.free`."""
    dims = solution.weights()
    return " ".join(
        "".join("." if is_frozen(e) else "*" for e in dims[name])
        for name in sorted(dims, key=lambda name: (len(name), name)))


def tried(case: Case, solution: Solution, tries: int = 6) -> list[Choices]:
    """The choices of slices that a case is tried with."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    return [choose(solution, rng, case.least) for _ in range(tries)]


def worst(case: Case, table: Mapping[str, Row] = TABLE) -> float:
    """Worst error over random choices of slices."""
    solution = solved(case, table)
    return max(error for choices in tried(case, solution)
               for error in differences(traced(case), solution, choices, case.random).values())


# Rows that no exported program of real numbers asks for.
NEVER = {
    "chunk": "made explicit as split_with_sizes", "_conj": "complex numbers only",
    "lift_fresh": "exported as lift_fresh_copy",
    **dict.fromkeys("cond while_loop scan map_impl associative_scan".split(),
                    "control flow: see test_decompose"),
}


def test_every_row_has_a_case() -> None:
    assert {case.op for case in CASES} == set(TABLE) - set(NEVER)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slicing_commutes(case: Case) -> None:
    packets = {n.op.removeprefix("aten.").rsplit(".", 1)[0] for n in traced(case).graph.nodes}
    assert case.op in packets, "the case does not reach its row"
    assert free_dims(solved(case)) == case.free
    assert any(tried(case, solved(case))) == ("*" in case.free)  # not vacuous
    assert worst(case) <= PROOF.value


def test_macs_are_those_that_torch_counts() -> None:
    """Of the dense operator and of pruned ones, wherever it runs as products of matrices."""
    counted: set[str] = set()
    for case in [*contraction_cases(), *convolution_cases(), *attention_cases()]:
        solution = solved(case)
        for choices in [{}, *tried(case, solution, 2)]:
            price = cost(solution, "macs")
            price.set({atom: choice.count for atom, choice in choices.items()})
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                run_pruned(traced(case), solution, choices)
            if flops := counter.get_total_flops():
                counted.add(case.op)
                assert 2 * price.total == flops, case
    assert counted >= set("addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d convolution "
                          "conv_transpose2d conv_transpose3d einsum linear matmul mm "
                          "scaled_dot_product_attention".split())


def test_a_kernel_takes_only_multiples() -> None:
    case = next(c for c in CASES if c.op == "transformers.grouped_mm_fallback")
    solution = solved(case)  # rows of whole 16 bytes: two numbers in float64
    assert {step_of(solution, g, 1, 8) for g in solution.groups.values()} == {2}
    linear = solved(next(c for c in CASES if c.op == "linear"))
    assert {step_of(linear, g, 1, 8) for g in linear.groups.values()} == {1}


# --- wrong rows are caught ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_row_is_caught(fault: str) -> None:
    wrong, case = FAULTS[fault]
    assert worst(case) <= PROOF.value
    table = type(TABLE)({**TABLE, case.op: wrong})
    try:
        error = worst(case, table)
    except (RuntimeError, IndexError, ValueError):
        return  # the pruned program does not even run
    assert error > 1e-4


def forgetful(row: Row) -> Row:
    """A row that reads nothing and gives its results axes of their own."""
    def wrong(s: Any, n: Any) -> None:
        before = len(s.reads)
        row(s, n)
        del s.reads[before:]
        for out in n.outputs:
            s.dims[out] = tuple(s.space.atom(e.size, *(["frozen"] if is_frozen(e) else []))
                                for e in s.dims.get(out, ()))

    return wrong


FREE = {case.op for case in CASES if "*" in case.free}


@pytest.mark.parametrize("name", sorted(set(TABLE) & FREE))
def test_every_row_matters(name: str) -> None:
    """No row passes its cases if what it relates is forgotten."""
    cases = [case for case in CASES if case.op == name]
    table = type(TABLE)({**TABLE, name: forgetful(TABLE[name])})
    for case in cases:
        if "*" in case.free:
            try:
                if worst(case, table) > 1e-4:
                    return
            except (RuntimeError, IndexError, ValueError):
                return
    raise AssertionError("a row that relates nothing passes")


# --- other shapes -------------------------------------------------------------------------------

SMALL = st.integers(2, 5)


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(NEVER)))
def test_slicing_commutes_at_other_shapes(name: str) -> None:
    tried: set[str] = set()
    known = {str(case) for case in CASES}

    def commutes(sizes: dict[int, int], a: int, b: int, c: int, seed: int) -> None:
        fixed = [other_sizes(case, sizes) for case in CASES if case.op == name]
        cases = [case for case in sized_cases(a, b, c) if case.op == name] or fixed
        case = cases[seed % len(cases)]
        try:
            module = Module(case)
            found = quick_trace(module, torch.tensor(1.0))
        except (RuntimeError, IndexError, ValueError):
            return  # sizes that the operator does not take
        found.graph.outputs = []
        solution, rng = solve(found.graph, TABLE, rewire=True), np.random.default_rng(seed)
        tried.add(str(case))
        for _ in range(2):
            errors = differences(found, solution, choose(solution, rng, case.least), case.random)
            assert max(errors.values(), default=0.0) <= PROOF.value

    drawn = given(st.dictionaries(st.sampled_from([3, 4, 5, 6]), SMALL, min_size=2), SMALL, SMALL,
                  SMALL, st.integers(0, 9))
    for examples in (3 if settings().max_examples <= 50 else 50, 40):  # few sizes fit some rows
        settings(max_examples=examples, database=None)(drawn(commutes))()
        if tried - known:
            break
    assert tried - known or name == "as_strided"  # strides are sizes


# --- random programs ----------------------------------------------------------------------------


def step(x: torch.Tensor, w: torch.Tensor, kind: str, k: int) -> torch.Tensor:
    """One of the ways in which models regroup, cut and mix dimensions, where it fits."""
    d = k % x.ndim
    size = x.shape[d]
    if kind == "factor" and x.ndim < 5:
        inner = [f for f in (2, 3) if size % f == 0 and size > f]
        return x.unflatten(d, (size // inner[k % len(inner)], inner[k % len(inner)])) \
            if inner else x
    if kind == "flatten" and x.ndim > 1:
        return x.flatten(d % (x.ndim - 1), d % (x.ndim - 1) + 1)
    if kind == "swap":
        return x.transpose(d, k // 3 % x.ndim)
    if kind in ("halves", "rotate", "gate") and size % 2 == 0:
        a, b = x.chunk(2, d)
        return {"halves": a + 2 * b, "rotate": torch.cat([-b, a], d), "gate": a * b.sin()}[kind]
    if kind == "cat" and x.numel() < 300:
        return torch.cat([x, x.cos()], d)
    if kind == "slice" and size > 2:
        return x.narrow(d, k % 2, size - 1)
    if kind == "grow" and x.numel() < 300 and x.ndim < 5:
        sizes = [-1] * (x.ndim + 1)
        sizes[d + 1] = 2
        return x.unsqueeze(d + 1).expand(sizes).flatten(d, d + 1)
    if kind == "sum" and x.ndim > 1:
        return x.sum(d)
    if kind == "mix" and x.shape[-1] <= 12:
        return torch.nn.functional.linear(x, w[:, : x.shape[-1]])
    return x


KINDS = "factor flatten swap halves rotate gate cat slice grow sum mix".split()
PROGRAMS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 11)), min_size=2, max_size=8)


@settings(max_examples=max(60, settings().max_examples))
@given(st.lists(st.sampled_from([2, 3, 4, 6, 8, 12]), min_size=1, max_size=3), PROGRAMS,
       st.integers(0, 9))
def test_slicing_commutes_with_programs(shape: list[int], steps: list[tuple[str, int]],
                                        seed: int) -> None:
    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for kind, k in steps:
            x = step(x, w, kind, k)
        return x.exp()

    case = Case("program", call, (tuple(shape), (6, 12)), "")
    found = trace(Module(case), (torch.tensor(1.0),))
    found.graph.outputs = []
    solution, rng = solve(found.graph, TABLE, rewire=True), np.random.default_rng(seed)
    for _ in range(4):
        errors = differences(found, solution, choose(solution, rng))
        assert max(errors.values()) <= PROOF.value
