"""Work on an ONNX file grows as its nodes do: calls are counted, not seconds."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import spacompiler
from spacompiler.groups.solution import Solution, solve
from spacompiler.onnx_backend import prove
from spacompiler.onnx_backend.read.file import open_model
from spacompiler.onnx_backend.read.lower import trace
from spacompiler.onnx_backend.run import observe, streamed
from spacompiler.onnx_backend.run.observe import FileNetwork
from spacompiler.rows.onnx_table import TABLE

WIDTH, INNER = 96, 12


class Builder:
    """Writes nodes one after the other; every value and array gets a name of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, onnx.TensorProto] = {}

    def weight(self, *shape: int) -> str:
        array = (self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        return self.fixed(f"w{len(self.arrays)}", array)

    def fixed(self, name: str, array: Any) -> str:
        self.arrays[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def op(self, kind: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        outs = [f"v{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, outs, f"n{len(self.nodes)}",
                                           **attributes))
        return outs[0] if count == 1 else outs

    def model(self, out: str) -> onnx.ModelProto:
        shape = ["N", 4, WIDTH]
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, shape)],
            list(self.arrays.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)],
                                 ir_version=8)


def blocks(count: int) -> onnx.ModelProto:
    """Residual blocks whose heads are cut out by constants that all blocks share."""
    b, x = Builder(), "x"
    heads, flat = b.fixed("heads", [0, 0, 3, 4]), b.fixed("flat", [0, 0, 12])
    for _ in range(count):
        y = b.op("Reshape", b.op("MatMul", x, b.weight(WIDTH, INNER)), heads)
        y = b.op("Reshape", b.op("Relu", y), flat)
        y = b.op("MatMul", y, b.op("Transpose", b.weight(WIDTH, INNER), perm=[1, 0]))
        x = b.op("Add", x, y)
    return b.model(x)


def frozen(count: int) -> onnx.ModelProto:
    """A stream of two halves that every block freezes again, with a reason of its own."""
    b = Builder()
    size, axes = b.fixed("size", [4, WIDTH // 2]), {"axes": [1, 2]}
    x = b.op("MatMul", "x", b.weight(WIDTH, WIDTH))
    for _ in range(count):
        halves = b.op("Split", x, b.fixed("cut", [WIDTH // 2] * 2), count=2, axis=-1)
        x = b.op("Add", x, b.op("Concat", *[b.op("CenterCropPad", h, size, **axes)
                                            for h in halves], axis=-1))
    return b.model(b.op("MatMul", x, b.weight(WIDTH, WIDTH)))


def calls(work: Callable[[], Any]) -> int:
    """How many functions are called, those written in C among them."""
    total = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal total
        total += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return total


def solved(model: onnx.ModelProto, folder: Path) -> Callable[[], Solution]:
    onnx.save(model, folder / "m.onnx")
    graph = trace(open_model(folder / "m.onnx")).graph
    return lambda: solve(graph, TABLE)


@pytest.mark.parametrize("make", [blocks, frozen])
def test_solving_costs_as_much_for_every_node(make: Callable[[int], onnx.ModelProto],
                                              tmp_path: Path) -> None:
    small, large = (calls(solved(make(n), tmp_path)) for n in (20, 80))
    assert large < 4.4 * small


def test_an_axis_keeps_the_first_few_of_its_reasons(tmp_path: Path) -> None:
    reasons = [why for _, _, why in solved(frozen(30), tmp_path)().frozen()]
    assert reasons and max(map(len, reasons)) <= 20


def test_compiling_costs_as_much_for_every_node(tmp_path: Path) -> None:
    def compiled(name: str) -> Callable[[], Any]:
        return lambda: spacompiler.compile(
            str(tmp_path / name), target="params=67%", importance="wanda", align=1,
            latency=False, out=tmp_path / f"{name}.out")

    counts = {}
    for n in (1, 4, 16):  # the first one pays for what is imported
        onnx.save(blocks(n), tmp_path / f"{n}.onnx")
        counts[n] = calls(compiled(f"{n}.onnx"))
    assert counts[16] < 3.7 * counts[4]


def test_external_arrays_are_let_go_one_by_one(tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[str] = []
    monkeypatch.setattr(ir.ExternalTensor, "release",
                        lambda self: released.append(self.name or ""))
    onnx.save(blocks(20), tmp_path / "m.onnx", save_as_external_data=True, location="m.data",
              size_threshold=0)
    spacompiler.compile(str(tmp_path / "m.onnx"), target="params=70%", importance="magnitude",
                        align=1, latency=False, onnx=False)
    assert 0 < len(released) < 20 * len({*released})


def test_a_large_file_is_proved_in_float64_an_array_at_a_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(blocks(6), tmp_path / "m.onnx", save_as_external_data=True, location="m.data",
              size_threshold=0)
    fetched: list[weakref.ref[Any]] = []
    alive: list[int] = []
    value = streamed._value

    def seen(model: Any, name: str, values: Any) -> Any:
        found = value(model, name, values)
        if name in model.graph.initializers and found.size > WIDTH and found.dtype == np.float64:
            fetched.append(weakref.ref(found))
            alive.append(sum(array() is not None for array in fetched))
        return found

    monkeypatch.setattr(streamed, "_value", seen)
    monkeypatch.setattr(prove, "DOUBLE_BYTES", 2**10)
    result = spacompiler.compile(str(tmp_path / "m.onnx"), target="params=70%",
                                 importance="magnitude", align=1, latency=False)
    assert result.job.proof is not None and result.job.proof.precision.startswith("float64")
    assert len(alive) > 20 and max(alive) <= 3


def test_one_run_shows_as_many_tensors_as_fit(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(blocks(12), tmp_path / "m.onnx")
    runs: list[int] = []
    expose = FileNetwork._expose

    def seen(self: Any, names: list[str], *rest: Any) -> Any:
        runs.append(len(names))
        return expose(self, names, *rest)

    monkeypatch.setattr(FileNetwork, "_expose", seen)
    for limit, want in ((None, [12]), (1, [1] * 12)):
        if limit is not None:
            monkeypatch.setattr(observe, "EXPOSED", limit)
        runs.clear()
        spacompiler.compile(str(tmp_path / "m.onnx"), target="params=70%", importance="wanda",
                            align=1, latency=False, prove=False)
        assert runs == want
