"""Example inputs that a request names: files and shapes; and what is shown meanwhile."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

import spacompiler
from spacompiler.errors import SpaError, UsageError
from spacompiler.onnx_backend.read.file import open_model
from spacompiler.pipeline.inputs import named_inputs
from spacompiler.request.recipe import Recipe
from spacompiler.system import shown

QUICK = {"importance": "magnitude", "align": 1, "onnx": False, "prove": False, "latency": False,
         "dry_run": True}


class Two(nn.Module):
    """Takes an image and an index."""

    def __init__(self):
        super().__init__()
        self.body, self.table = nn.Conv2d(3, 16, 3), nn.Embedding(10, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x, index):
        return self.head(self.body(x).mean((2, 3)) + self.table(index))


def test_shapes_and_files_take_the_place_of_made_up_inputs(tmp_path):
    made = (torch.randn(2, 3, 8, 8), torch.tensor([7, 9]))
    (x, index), _ = named_inputs(Two(), made, Recipe("params=50%", input_shape=[
        "input0=4x3x12x12", "input1=4"]))
    assert x.shape == (4, 3, 12, 12) and index.shape == (4,) and set(index.tolist()) <= {7, 9}
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3, 6, 6), "float32"), index=np.array([1, 2]))
    found = named_inputs(Two(), made, Recipe("params=50%", inputs=str(tmp_path / "x.npz")))
    assert found["x"].shape == (2, 3, 6, 6) and found["index"].tolist() == [1, 2]
    for wrong, what in ((["2x3"], "names no input"), (["input0=2x0"], "cannot read"),
                        (["inptu0=2x3"], "no input 'inptu0'")):
        with pytest.raises(UsageError, match=what):
            named_inputs(Two(), made, Recipe("params=50%", input_shape=wrong))
    with pytest.raises(SpaError, match="cannot be read"):
        named_inputs(Two(), made, Recipe("params=50%", inputs=str(tmp_path / "none.npz")))


def test_an_onnx_file_with_free_axes_is_costed_at_the_shape_that_is_given(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, (8, 3, 1, 1), np.ones(24, "float32"))
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, "h", "w"])], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)],
                                ir_version=8), tmp_path / "m.onnx")
    found = named_inputs(open_model(str(tmp_path / "m.onnx")), {}, Recipe(
        "params=50%", input_shape="1x3x40x30"))
    assert found["x"].shape == (1, 3, 40, 30)


def test_progress_is_shown_where_somebody_looks_on(monkeypatch):
    told = []
    with shown.shown(lambda *a: told.append(a), quiet=True) as tick:
        tick("a", 0, 1)
    assert told == [("a", 0, 1)]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with shown.shown(None, quiet=True) as tick:
        assert tick is None
    with shown.shown(None, quiet=False) as tick:
        tick("b", 0, 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with shown.shown(None, quiet=False) as tick:
        assert tick is None


def test_a_result_is_a_table_in_a_notebook():
    net = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8))
    found = spacompiler.compile(net, (torch.randn(4, 16),), target="params~60%", quiet=True,
                                name="<net>", **QUICK)
    text = found._repr_html_()
    assert "&lt;net&gt;" in text and "<th>pruned</th>" in text and text.count("<tr>") >= 4
