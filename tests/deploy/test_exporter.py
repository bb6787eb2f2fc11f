"""Exports that repeat nothing: the exporter by its steps, one file from another, turns of times."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

import spacompiler
from spacompiler.artifact import places, torch_files
from spacompiler.axes.choices import Choices
from spacompiler.deploy import export, exporter, words
from spacompiler.deploy.export import Form, export_onnx
from spacompiler.deploy.twin import twin
from spacompiler.groups.solution import Solution, solve
from spacompiler.plan.plan import make_plan
from spacompiler.rows.aten_table import TABLE
from spacompiler.runtime import latency
from spacompiler.runtime.latency import LEAST_TURNS, compare_latency
from spacompiler.runtime.session import open_session, run_session
from spacompiler.torch_backend.emit import refresh
from spacompiler.torch_backend.emit.program import rewrite
from spacompiler.torch_backend.read import decompose
from spacompiler.torch_backend.read.export import trace
from spacompiler.torch_backend.trace import Trace


class Block(nn.Module):
    """Heads, a product with a power of a whole number, and a norm that ONNX spells otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(40)
        self.qkv, self.out = nn.Linear(40, 120), nn.Linear(40, 40)
        self.up, self.down = nn.Linear(40, 120), nn.Linear(120, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(*x.shape[:2], 2, 20).transpose(1, 2)
                   for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(self.up(x).relu().pow(2) + 1)


@pytest.fixture(scope="module")
def blocks() -> Trace:
    torch.manual_seed(0)
    return trace(nn.Sequential(Block(), Block(), Block()).eval(), (torch.randn(2, 5, 40),))


def pruned(traced: Trace, role: str) -> tuple[Solution, Choices]:
    solution = solve(traced.graph, TABLE, rewire=True)
    groups = [g for g in solution.groups.values() if g.role == role]
    assert groups
    counts = {g.name: g.size // 2 for g in groups}
    scores = {g.name: np.arange(g.size, dtype=float).reshape(g.shape) for g in groups}
    return solution, make_plan(groups, scores, counts).choices(solution)


def written(traced: Trace, path: Path, program: Any = None, **options: Any) -> bytes:
    export_onnx(program or traced.exported, path, input_names=traced.graph.inputs, **options)
    return path.read_bytes()


def test_the_exporter_by_its_steps_writes_what_it_writes_as_a_whole(
        blocks: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(exporter, "_whole", None)
        by_steps = written(blocks, tmp_path / "steps.onnx")
    monkeypatch.setattr(exporter, "_by_steps", None)
    assert by_steps == written(blocks, tmp_path / "whole.onnx")
    assert any(n.op_type == "Pow" for n in onnx.load_from_string(by_steps).graph.node)


def test_what_repeats_in_every_block_is_decomposed_once(
        blocks: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plain = decompose._traced
    monkeypatch.setattr(decompose, "_traced", lambda *given: made.append(1) or plain(*given))
    written(blocks, tmp_path / "m.onnx")
    norms = [n for n in blocks.graph.nodes if "rms_norm" in n.op]
    assert len(norms) == 3
    assert 0 < len(made) < 3 * len({n.op for n in blocks.graph.nodes})
    first = len(made)
    made.clear()
    one = trace(Block().eval(), (torch.randn(2, 5, 40),))
    written(one, tmp_path / "one.onnx")
    assert len(made) >= first - 1  # three blocks take no more than one


@pytest.mark.parametrize("role", ["channel", "head"])
def test_values_that_a_plan_leaves_alone_are_not_computed_again(
        blocks: Trace, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solution, choices = pruned(blocks, role)
    quick = rewrite(blocks, solution, choices)
    monkeypatch.setattr(refresh, "_is_alike", lambda one, other: False)
    whole = rewrite(blocks, solution, choices)
    for one, other in zip(quick.graph.nodes, whole.graph.nodes, strict=True):
        kinds = ([refresh._kind(v) for v in pytree.tree_leaves(node.meta.get("val"))]
                 for node in (one, other))
        assert next(kinds) == next(kinds), one


def test_the_dense_file_is_the_pruned_one_with_its_own_arrays(
        blocks: Trace, tmp_path: Path) -> None:
    solution, choices = pruned(blocks, "channel")
    arrays = {n: a for n, a in blocks.exported.state_dict.items() if "up." in n or "down.w" in n}
    save_file(arrays, tmp_path / "w.safetensors")
    # as if it were large
    apart = {"beside": (tmp_path / "w.safetensors",), "form": Form(external=0)}
    written(blocks, tmp_path / "dense.onnx")
    written(blocks, tmp_path / "pruned.onnx", rewrite(blocks, solution, choices), **apart)
    files = sorted(tmp_path.iterdir())
    x = {blocks.graph.inputs[0]: np.ones((3, 5, 40), dtype=np.float32)}
    want = run_session(open_session(tmp_path / "dense.onnx"), x)
    with twin(tmp_path / "pruned.onnx", arrays) as path:
        assert path is not None
        found = run_session(open_session(path), x)
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(want, found, strict=True))
    with twin(tmp_path / "pruned.onnx", {**arrays, "nowhere": torch.ones(3)}) as path:
        assert path is None
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.parametrize("role, exports", [("channel", 1), ("head", 2)])
def test_the_dense_network_is_exported_where_sizes_stand_in_the_program(
        role: str, exports: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    plain = export.translated
    monkeypatch.setattr(export, "translated", lambda *given: made.append(1) or plain(*given))
    monkeypatch.setattr(torch_files, "_served", lambda job: [(job.trace.args, job.trace.kwargs)])
    monkeypatch.delattr(latency, "_ask_child")  # nothing so small needs a process of its own
    monkeypatch.setattr(places, "Form", partial(Form, external=0))
    torch.manual_seed(0)
    result = spacompiler.compile(Block().eval(), (torch.randn(2, 5, 40),), target="params~80%",
                                 roles=(role,), align=1, importance="magnitude", repair="none",
                                 out=tmp_path / "out", prove=False)
    assert len(made) == exports
    assert result.report["latency"]["turns"] >= LEAST_TURNS


def test_the_table_that_is_read_late_says_the_same_as_the_whole() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    late, whole = words._read_late(20), ONNXRegistry.from_torchlib(opset_version=20)
    assert late.functions.keys() == whole.functions.keys()
    unread = [meta for own in late.functions.values() for meta in own if meta.signature is None]
    assert len(unread) > len(late.functions) / 2, "signatures are worked out when they are needed"
    for target in (torch.ops.aten.relu.default, torch.ops.aten.add.Tensor,
                   torch.ops.aten.mean.dim, torch.ops.higher_order.cond):
        one, other = late.get_decomps(target), whole.get_decomps(target)
        assert [(m.onnx_function, m.is_complex, str(m.signature)) for m in one] == [
            (m.onnx_function, m.is_complex, str(m.signature)) for m in other]
    assert late.get_decomps(torch.ops.aten.relu.default)[0].signature is not None


def test_a_table_that_is_built_otherwise_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(opset: int) -> None:
        raise ImportError

    monkeypatch.setattr(words, "_read_late", changed)
    assert words.words.__wrapped__(20).is_registered(torch.ops.aten.relu.default)


def test_no_further_turn_is_taken_once_the_ratio_is_known(blocks: Trace, tmp_path: Path) -> None:
    written(blocks, tmp_path / "m.onnx")
    paths = {name: tmp_path / "m.onnx" for name in ("one", "other")}
    x = {blocks.graph.inputs[0]: np.ones((2, 5, 40), dtype=np.float32)}
    for steady, turns in ((1e9, LEAST_TURNS), (0.0, 9)):
        found = compare_latency(paths, x, repeats=9, steady=steady, isolate=False)
        assert found["one"].repeats == turns
