"""An ONNX file with int8 weights, made by onnxruntime's dynamic quantisation."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from ..errors import SpaError
from .latency import Arrays, open_session, run_session


def quantize(path: Path, made: Path) -> None:
    """Write a file with int8 weights: one scale a column for products, one for a table of rows.

    Activations are quantised when the file runs, so no calibration is needed.

    Raises:
        SpaError: onnxruntime cannot quantise the file, or found nothing to quantise in it.
    """
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=f".{made.name}.") as folder:
        plain = Path(folder) / "plain.onnx"
        _with_plain_weights(path, plain)
        root = logging.getLogger()
        was = root.level
        try:
            root.setLevel(logging.ERROR)  # it advises a preparation that is done already
            quantize_dynamic(plain, Path(folder) / made.name, per_channel=True,
                             weight_type=QuantType.QInt8,
                             extra_options={"MatMulConstBOnly": True})
        except Exception as problem:  # it raises its own kinds
            raise SpaError("the ONNX file cannot be quantised", where=str(path),
                           why=str(problem), fix="leave --int8 out") from problem
        finally:
            root.setLevel(was)
        model = ir.load(Path(folder) / made.name)
        if not any(v.dtype in (ir.DataType.INT8, ir.DataType.UINT8)
                   for v in model.graph.initializers.values()):
            raise SpaError("nothing in the ONNX file can be quantised", where=str(path),
                           why="it has no product or convolution with constant weights",
                           fix="leave --int8 out")
        (Path(folder) / made.name).replace(made)


def _with_plain_weights(path: Path, made: Path) -> None:
    """Copy a file, transposed weights (those of Linear layers) as what they are: weights.

    The quantiser sees only weights that enter a product directly.
    """
    model = ir.load(path)
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer() and weight.const_value is not None:
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
            array = np.ascontiguousarray(np.transpose(weight.const_value.numpy(), order))
            name = f"{weight.name}.transposed"
            value = ir.Value(name=name, shape=ir.Shape(array.shape), type=weight.type,
                             const_value=ir.tensor(array, name=name))
            if name in model.graph.initializers:
                value = model.graph.initializers[name]
            else:
                model.graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
            if not weight.uses():
                del model.graph.initializers[str(weight.name)]
    ir.save(model, made, external_data=made.name + ".data")


def difference(path: Path, made: Path, inputs: Arrays) -> dict[str, Any]:
    """Return how far a file is from another on some inputs, by the first output of both.

    `same` is the share of positions whose largest value stands at the same place of the last axis;
    `rms_rel` is the root mean square of differences over that of the first file's results.
    """
    want, got = (run_session(open_session(p), inputs)[0].astype(np.float64) for p in (path, made))
    scale = float(np.sqrt(np.mean(want**2))) or 1.0
    return {"same": float(np.mean(want.argmax(-1) == got.argmax(-1))),
            "rms_rel": float(np.sqrt(np.mean((want - got) ** 2))) / scale,
            "bytes": size(made), "float_bytes": size(path)}


def size(path: Path) -> int:
    """Bytes of a file with its external weights."""
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)
