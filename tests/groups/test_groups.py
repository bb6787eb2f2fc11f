"""The groups of every small model, as text that a person can review, and what they mean."""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from spacompiler import models_zoo
from spacompiler.axes.expressions import Atom, atoms, concat, product, reasons, show
from spacompiler.graph.ir import Node
from spacompiler.groups.fibres import beside
from spacompiler.groups.solution import Group, Solution, solve
from spacompiler.groups.why import why
from spacompiler.rows.aten_table import TABLE
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace

GOLDEN = Path(__file__).parents[1] / "golden"
REAL = {"smollm2-135m", "gemma3-270m", "efficientnet-lite0"}
SMALL = [name for name in models_zoo.names() if name not in REAL]
SOLVE_SECONDS = 0.1


@cache
def traced(name: str) -> Trace:
    return trace(*models_zoo.load(name).build())


def each(names: list[str]) -> list[Any]:
    """The tests of a model run in one worker, which traces it once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"zoo-{name}")) for name in names]


@pytest.mark.parametrize("name", each(SMALL))
def test_golden(name: str, regen: bool) -> None:
    text = str(solve(traced(name).graph, TABLE)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if regen:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", each(SMALL))
def test_solving_is_fast(name: str) -> None:
    graph, best = traced(name).graph, float("inf")
    for _ in range(3):
        start = time.perf_counter()
        solve(graph, TABLE)
        best = min(best, time.perf_counter() - start)
    assert best <= SOLVE_SECONDS


def test_no_stale_goldens() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(SMALL)


# Parameters of which nothing can be removed, besides biases of the model's outputs: why.
UNREACHED = {
    "mixer": ("blocks.*.tokens.2.bias", "aten.mean.dim over it"),  # one for each position
    "t5": ("*shared.weight *layer_norm.weight", "model output"),  # the encoder's last states
}
UNKNOWN: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", each(SMALL))
def test_every_parameter_is_reached(name: str) -> None:
    solution = solve(traced(name).graph, TABLE)
    reached = {m.weight for group in solution.groups.values() for m in group.members}
    patterns, reason = UNREACHED.get(name, ("", ""))
    for weight, tensor in solution.graph.weights().items():
        if tensor.kind == "parameter" and weight not in reached:
            why_not = "; ".join(r for e in solution.dims(weight) for r in reasons(e))
            if any(fnmatchcase(weight, pattern) for pattern in patterns.split()):
                assert reason in why_not
            else:
                assert len(tensor.shape) == 1 and "model output" in why_not, weight


@pytest.mark.parametrize("name", each(SMALL))
def test_every_operator_is_known(name: str) -> None:
    solver = solve(traced(name).graph, TABLE).solver
    assert {node.op for node in solver.opaque} == UNKNOWN.get(name, set())
    assert solver.space.clashes == []


# --- a Llama by meaning -------------------------------------------------------------------------

LAYERS = 2


@cache
def traced_llama() -> Trace:
    config = LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        attention_bias=True, use_cache=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return trace(model, {"input_ids": torch.arange(12).reshape(2, 6)})


@cache
def llama() -> Solution:
    return solve(traced_llama().graph, TABLE)


ROWS = {  # dimension: (expression, role of each atom)
    "self_attn.q_proj.weight:0": ("2*3*(4+4)", "head, head, head dim"),
    "self_attn.q_proj.bias:0": ("2*3*(4+4)", "head, head, head dim"),
    "self_attn.k_proj.weight:0": ("2*(4+4)", "head, head dim"),
    "self_attn.v_proj.weight:0": ("2*8", "head, head dim"),
    "self_attn.o_proj.weight:1": ("2*3*8", "head, head, head dim"),
    "self_attn.q_proj.weight:1": ("24", "hidden"),
    "self_attn.o_proj.weight:0": ("24", "hidden"),
    "mlp.gate_proj.weight:0": ("20", "channel"),
    "mlp.up_proj.weight:0": ("20", "channel"),
    "mlp.down_proj.weight:1": ("20", "channel"),
    "mlp.down_proj.weight:0": ("24", "hidden"),
    "input_layernorm.weight:0": ("24", "hidden"),
}


def dimension(solution: Solution, label: str, layer: int = 0) -> Any:
    weight, dim = f"model.layers.{layer}.{label}".rsplit(":", 1)
    return solution.dims(weight)[int(dim)]


def group_of(solution: Solution, atom: Atom) -> Group:
    return solution.by_atom()[atom]


@pytest.mark.parametrize("label", ROWS)
def test_llama_dimensions(label: str) -> None:
    text, roles = ROWS[label]
    for layer in range(LAYERS):
        e = dimension(llama(), label, layer)
        assert show(e) == text
        assert ", ".join(group_of(llama(), a).role for a in atoms(e)) == roles


def test_llama_fibres() -> None:
    """Heads and value dims are free in each KV group; rotated dims are one set for all."""
    q, v = (dimension(llama(), f"self_attn.{n}_proj.weight:0") for n in "qv")
    kv, repeats, rotated = atoms(q)
    assert atoms(v)[0] is kv and atoms(dimension(llama(), "self_attn.o_proj.weight:1")) == [
        kv, repeats, atoms(v)[1]]
    outers = {atom: group_of(llama(), atom).outers for atom in (*atoms(q), *atoms(v))}
    assert outers == {kv: (), repeats: (kv,), rotated: (), atoms(v)[1]: (kv,)}
    assert group_of(llama(), repeats).shape == (2, 3)
    other = atoms(dimension(llama(), "self_attn.q_proj.weight:0", 1))
    assert other[2] is rotated and other[0] is not kv  # one table of rotary frequencies


def test_llama_residual_is_one_atom() -> None:
    (atom,) = {a for layer in range(LAYERS) for label, (_, role) in ROWS.items()
               if role == "hidden" for a in atoms(dimension(llama(), label, layer))}
    group = group_of(llama(), atom)
    assert atom in atoms(llama().dims("model.embed_tokens.weight")[1])
    assert not group.approximate  # RMSNorm is exact
    parts = "embed_tokens norm q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert all(any(part in m.weight for m in group.members) for part in parts)
    # an embedding, a last norm; 7 matrices, 2 norms and the bias of one of them per layer
    assert len(group.members) == 2 + LAYERS * (7 + 2 + 1)


def test_llama_groups_are_these() -> None:
    per_layer = 4  # KV groups, query heads in them, value dims, intermediate channels
    assert len(llama().groups) == LAYERS * per_layer + 2  # and the residual, the rotated dims
    frozen = {(weight, dim) for weight, dim, _ in llama().frozen()}
    assert frozen == {("model.embed_tokens.weight", 0)}


def test_a_frozen_axis_says_why() -> None:
    ((_, _, said),) = llama().frozen()
    assert any("embedding" in reason for reason in said)
    assert any("model output" in reason for reason in said)


# --- why ----------------------------------------------------------------------------------------

CHAINS = [
    ("self_attn.q_proj.weight:0", "self_attn.o_proj.weight:1"),
    ("self_attn.q_proj.weight:0", "self_attn.k_proj.weight:0"),
    ("self_attn.k_proj.weight:0", "self_attn.v_proj.weight:0"),
    ("mlp.gate_proj.weight:0", "mlp.down_proj.weight:1"),
    ("mlp.up_proj.weight:0", "mlp.gate_proj.weight:0"),
    ("self_attn.o_proj.weight:0", "mlp.down_proj.weight:0"),
]


@pytest.mark.parametrize(("one", "other"), CHAINS)
def test_why(one: str, other: str) -> None:
    solution = llama()
    ends = [(f"model.layers.0.{e}".rsplit(":", 1)[0], int(e[-1])) for e in (one, other)]
    shared = set.intersection(*(set(atoms(dimension(solution, e))) for e in (one, other)))
    chain = why(solution, *ends)
    first, last = (solution.graph.weights()[weight].name for weight, _ in ends)
    assert (chain[0], chain[-1]) == (first, last)
    assert len(chain) >= 3 and len(chain) % 2
    for before, node, after in zip(chain[::2], chain[1::2], chain[2::2], strict=False):
        assert isinstance(node, Node)
        assert {before, after} <= {*node.refs(), *node.outputs}
        for tensor in (before, after):
            assert shared & {a for e in solution.dims(tensor) for a in atoms(e)}


def test_why_nothing() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    assert why(llama(), (name, 0), (name, 1)) == []


# --- fibres need their outer axis on the left ---------------------------------------------------


class Gram(nn.Module):
    """Products of all pairs of rows: dims of one head meet those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.out = nn.Linear(5, 6, bias=False), nn.Linear(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.rows(x).unflatten(1, (2, 3))
        return self.out(torch.einsum("bhd,bgd->bhg", heads, heads))


def test_dims_that_meet_across_heads_are_not_fibred() -> None:
    solution = solve(trace(Gram(), (torch.rand(2, 5),)).graph, TABLE)
    heads, dims = atoms(solution.dims("rows.weight")[0])
    assert atoms(solution.dims("out.weight")[1]) == [heads]
    assert group_of(solution, dims).outers == ()


class Turned(nn.Module):
    """Heads and dims of one weight; the dims come first in the second model."""

    def __init__(self, turn: bool) -> None:
        super().__init__()
        self.rows, self.turn = nn.Linear(5, 6, bias=False), turn
        self.out = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rows(x).unflatten(1, (2, 3))
        return self.out((y.transpose(1, 2) if self.turn else y).flatten(1))


@pytest.mark.parametrize(("turn", "columns", "outers"), [(False, "2*3", 1), (True, "3*2", 0)])
def test_fibres_follow_the_layout(turn: bool, columns: str, outers: int) -> None:
    solution = solve(trace(Turned(turn), (torch.rand(2, 5),)).graph, TABLE)
    assert show(solution.dims("rows.weight")[0]) == "2*3"
    assert show(solution.dims("out.weight")[1]) == columns
    _, dims = atoms(solution.dims("rows.weight")[0])
    assert len(group_of(solution, dims).outers) == outers


def test_what_stands_beside_an_atom() -> None:
    """Outside and inside of it at every place where it is mentioned."""
    h, x, y, z, t = (Atom(2, i) for i in range(5))
    e = product((h, concat((product((x, y)), product((x, z)))), t))
    assert list(beside(e)) == [
        (h, set(), {x, t}), (x, {h}, {y, t}), (y, {h, x}, {t}), (x, {h}, {z, t}),
        (z, {h, x}, {t}), (t, {h, x}, set())]


def test_network_shows_groups() -> None:
    graph = llama().network()
    kinds = {data["kind"] for _, data in graph.nodes(data=True)}
    assert kinds == {"group", "dimension"}
    for name, group in llama().groups.items():
        assert set(graph[f"group {name}"]) == {str(m) for m in group.members}
