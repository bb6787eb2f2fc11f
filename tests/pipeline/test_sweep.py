"""Several sizes of one model, traced and scored once, are the compiles of those sizes."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import UsageError
from spacompiler.onnx_backend.module import opened
from spacompiler.pipeline import analyse, sweep
from spacompiler.request.recipe import Recipe

QUICK = {"importance": "magnitude", "align": 1, "onnx": False, "prove": False}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(),
                         nn.Linear(60, 8)), (torch.randn(4, 16),)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 16, generator=generator),) for _ in range(3)]


def test_each_size_is_the_compile_of_that_size(monkeypatch):
    module, inputs = net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    calls = []
    traced = analyse.trace_whole_or_parts
    monkeypatch.setattr(analyse, "trace_whole_or_parts", lambda *a: calls.append(1) or traced(*a))
    asked = {"importance": "wanda", "align": 1, "onnx": False, "repair": "refit"}
    seen = []
    found = spacompiler.sweep(module, inputs, sizes=(0.5, 0.8), calibration=batches(),
                              evaluate=lambda m: seen.append(m) or float(
                                  sum(p.abs().sum() for p in m.parameters())), **asked)
    assert calls == [1] and [p.target for p in found.points] == ["params~0.8", "params~0.5"]
    for point, made in zip(found.points, seen[1:], strict=True):
        alone = spacompiler.compile(module, inputs, target=point.target, calibration=batches(),
                                    latency=False, prove=False, **asked)
        assert alone.plan.costs == point.costs
        assert all(map(torch.equal, alone.module.state_dict().values(),
                       made.state_dict().values()))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.fixture
def file(tmp_path):
    """Three layers as an ONNX file."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 20]>
        net (float[n, 16] x) => (float[n, 8] y) {
            h = Gemm(x, a) r = Relu(h) i = Gemm(r, b) s = Relu(i) y = Gemm(s, c) }""")
    draws = np.random.default_rng(0)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(draws.standard_normal(
        shape).astype("float32"), name) for name, shape in (
            ("a", (16, 40)), ("b", (40, 60)), ("c", (60, 8))))
    onnx.save(model, tmp_path / "net.onnx")
    return str(tmp_path / "net.onnx")


def test_a_file_is_swept_as_its_compiles_would_be(file, tmp_path):
    asked = {"importance": "wanda", "align": 1, "repair": "refit",
             "calibration": [{"x": x} for x, in batches()]}
    x, seen = torch.randn(5, 16), []
    found = spacompiler.sweep(file, sizes=(0.5, 0.8), **asked,
                              evaluate=lambda m: seen.append(m(x)[0]) or float(seen[-1].std()))
    for point, result in zip(found.points, seen[1:], strict=True):
        alone = spacompiler.compile(file, target=point.target, prove=False, **asked)
        assert alone.plan.costs == point.costs
        assert torch.equal(opened(alone.module, tmp_path)(x)[0], result)
    large, small = spacompiler.sweep(file, sizes=(0.2, 0.9), **asked).points
    assert 1 > small.quality["agreement"] > 0 and 0 <= large.lost < small.lost


def test_the_winner_is_the_smallest_that_loses_little():
    module, inputs = net()
    sizes = iter((10.0, 9.8, 9.6, 8.0))
    found = spacompiler.sweep(module, inputs, sizes=(0.9, 0.7, 0.5), **QUICK,
                              evaluate=lambda _: next(sizes))
    assert [round(p.lost, 3) for p in found.points] == [0.02, 0.04, 0.2]
    assert found.winner is found.points[1] and found.recipe().target == "params~0.7"
    assert "winner" in repr(found) and max(map(len, repr(found).splitlines())) <= 80
    assert found._repr_svg_().count("<circle") == 3
    strict = sweep.winner(found.points, 0.01)
    assert strict is None


def test_without_a_function_quality_is_what_held_out_data_says():
    module, inputs = net()
    found = spacompiler.sweep(module, inputs, sizes=(0.9, 0.3), calibration=batches(), **QUICK)
    small = found.points[1]
    assert small.quality and 0 <= small.lost <= 1 and "answers on " in found.rule


def test_a_size_out_of_reach_is_said_and_the_others_stand():
    module, inputs = net()
    found = spacompiler.sweep(module, inputs, sizes=(0.9, 0.5), floor=0.95, metric="macs",
                              **QUICK, ignore=[])
    assert all(p.costs or p.why for p in found.points)
    for odd in ({"blocks": "1"}, {"recovery": "lora"}):
        with pytest.raises(UsageError, match=r"cannot be made|no option"):
            spacompiler.sweep(module, inputs, **QUICK, **odd)
    with pytest.raises(UsageError, match="no sizes"):
        spacompiler.sweep(module, inputs, sizes=(), **QUICK)


def test_the_command_line_sweeps_and_writes_the_winners_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("def score(m):\n    return 1.0\n")
    done = CliRunner().invoke(app, [
        "sweep", "zoo:mlp", "--sizes", "90,60", "--importance", "magnitude", "--align", "1",
        "--no-onnx", "--no-prove", "--no-latency", "--eval", f"{tmp_path / 'mine.py'}:score",
        "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    assert "winner" in done.stdout and "compile zoo:mlp --recipe" in done.stdout
    data = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["winner"] for row in data["sizes"]] == [False, True]
    made = Recipe.read(tmp_path / "out" / "recipe.yaml")
    assert made.target == "params~0.6" and made.model == "zoo:mlp"
    assert (tmp_path / "out" / "sweep.svg").read_text().startswith("<svg")
    for wrong in (["--sizes", "0"], ["--target", "params=50%"], ["--eval", "nowhere:f"]):
        done = CliRunner().invoke(app, ["sweep", "zoo:mlp", *wrong])
        assert done.exit_code == 2, (wrong, done.stdout)
