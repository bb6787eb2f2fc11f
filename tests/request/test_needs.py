"""Options that would do nothing are errors, from Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import spacompiler
from spacompiler.cli.main import app
from spacompiler.errors import UsageError
from spacompiler.request.needs import EXPORTED, NEEDS
from spacompiler.request.options import known
from spacompiler.request.recipe import Errand, Recipe

ALONE: dict[str, dict[str, Any]] = {
    "recover_data": {"recover_data": "text.txt"}, "recover_samples": {"recover_samples": 8},
    "recover_batch": {"recover_batch": 8}, "checkpoint": {"checkpoint": "place"},
    "decoder": {"decoder": True, "onnx": False}, "int8": {"int8": True, "onnx": False},
    "opset": {"opset": 18, "onnx": False}, "int8_bits": {"int8_bits": 8},
    "keep_adapter": {"keep_adapter": True},
}
FLAGS = {"decoder": ["--decoder", "--no-onnx"], "int8": ["--int8", "--module", "0"],
         "opset": ["--opset", "18", "--no-onnx"],
         "keep_adapter": ["--keep-adapter"]}


def test_every_need_speaks_of_options() -> None:
    names = {entry.name for table in (Recipe, Errand) for entry in known(table)}
    assert ALONE.keys() == NEEDS.keys() <= names
    assert {need.option for need in NEEDS.values()} <= names


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_without_what_it_needs_is_refused_in_python(name: str) -> None:
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    with pytest.raises(UsageError, match=f"{name} has nothing to act on"):
        spacompiler.compile(net, (torch.randn(4, 12),), target="params=60%", dry_run=True,
                            **ALONE[name])


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_without_what_it_needs_is_refused_on_the_command_line(name: str) -> None:
    flags = FLAGS.get(name) or ["--" + name.replace("_", "-"), str(ALONE[name][name])]
    done = CliRunner().invoke(app, ["compile", "zoo:mlp", "--target", "params=60%", "--dry-run",
                                    *flags])
    assert done.exit_code == 2 and f"{name} has nothing to act on" in done.stderr
    assert NEEDS[name].give in done.stderr


def test_a_recipe_without_its_files_is_one() -> None:
    """Trials of blocks, and parts that were entered because the whole cannot be traced."""
    asked = Recipe("body=60%", int8=True, int8_bits=8, decoder=True, opset=18)
    assert asked.unexported() == Recipe("body=60%", onnx=False, latency=False)
    there = Recipe("body=60%", runtime="genai").unexported()
    assert (there.decoder, there.onnx, there.layout) == (False, False, "uniform")
    assert Recipe("body=60%", runtime="openvino").unexported().lanes == 16


def test_batches_to_train_on_need_a_training() -> None:
    net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    with pytest.raises(UsageError, match="recover_data has nothing to act on"):
        spacompiler.compile(net, (torch.randn(4, 12),), target="params=60%", dry_run=True,
                            recover_data=[(torch.randn(4, 12),)])


@pytest.mark.parametrize(("name", "value"), [("opset", "18"), ("shard_size", "1MB")])
def test_an_option_about_exported_files_is_refused_for_an_onnx_file(
        name: str, value: str, tmp_path: Path) -> None:
    assert name in EXPORTED
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        m (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }""")
    onnx.save(model, tmp_path / "m.onnx")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [
        "compile", str(tmp_path / "m.onnx"), "--target", "params=60%", "--out", str(out),
        "--" + name.replace("_", "-"), value])
    assert done.exit_code == 2 and not out.exists()
    assert f"{name} has nothing to act on in an ONNX file" in done.stderr
