"""ONNX files as exporters, quantisers and optimisers write them are read, pruned and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import spacompiler
from spacompiler.api import Result

RNG = np.random.default_rng(0)


def weights(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Add seeded initialisers."""
    return numbers(model, **{name: (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:])))
                             .astype(np.float32) for name, shape in shapes.items()})


def numbers(model: onnx.ModelProto, **arrays: Any) -> onnx.ModelProto:
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def parsed(text: str, opset: int = 18, ir_version: int = 8) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}')


def pruned(model: onnx.ModelProto | Path, folder: Path, **options: Any) -> Result:
    """Compile a model and write it: the file is checked as it lies there."""
    if not isinstance(model, Path):
        onnx.save(model, folder / "m.onnx")
        model = folder / "m.onnx"
    asked = {"target": "params=70%", "importance": "magnitude", "align": 1, "latency": False}
    return spacompiler.compile(str(model), out=folder / "out", **asked | options)


def mlp(hidden: int = 64) -> onnx.ModelProto:
    return weights(parsed("""m (float[N, 8] x) => (float[N, 40] y) {
        a = Gemm(x, w1, b1)
        h = Relu(a)
        c = Gemm(h, w2, b2)
        t = Tanh(c)
        y = MatMul(t, w3)
    }"""), w1=(8, hidden), b1=(hidden,), w2=(hidden, 40), b2=(40,), w3=(40, 40))


# --- arrays beside the file -------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1000])
def test_small_arrays_may_lie_beside_the_file(threshold: int, tmp_path: Path) -> None:
    """Whatever the current folder is; arrays that stay whole are written, too."""
    onnx.save(mlp(), tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data",
              size_threshold=threshold)
    result = pruned(tmp_path / "m.onnx", tmp_path, only=["w1:1"])
    assert result.job.proof.error < 1e-10
    assert all(check.passed for check in spacompiler.verify(tmp_path / "out"))
    assert "m.onnx.data" not in str(onnx.load(tmp_path / "out/model.onnx",
                                              load_external_data=False))


def test_the_hash_of_a_file_is_over_small_arrays_beside_it_as_well(tmp_path: Path) -> None:
    digests = []
    for seed in (1, 2):
        model = numbers(parsed("m (float[N, 2] x) => (float[N, 2] y) {y = MatMul(x, w)}"),
                        w=np.full((2, 2), seed, np.float32))
        onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="d",
                  size_threshold=0)
        digests.append(spacompiler.source.load(str(tmp_path / "m.onnx")).module.digest)
    assert digests[0] != digests[1]
