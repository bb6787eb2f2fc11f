"""An ONNX file with int8 weights, made by onnxruntime's dynamic quantisation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from ..errors import SpaError
from ..runtime.session import Arrays, open_session, run_session
from ..system.process import at_level
from ..system.staging import Scratch

INLINE_BYTES = 2**30
BITS = (7, 8)
EXACT = {"avx_vnni", "avx512_vnni", "asimddp", "i8mm"}
"""Features of processors that add products of int8 without saturation."""


def quantize(path: Path, made: Path, bits: int = 7) -> None:
    """Write a file with int8 weights: one scale a column for products, one for a table of rows.

    Activations are quantised when the file runs, so no calibration is needed. With 7 `bits` weights
    lie in -64..64: processors without VNNI add two products of an unsigned activation and a
    weight in 16 bits, and 255 × 64 × 2 still fits, where 255 × 127 × 2 saturates, silently. With 8
    bits weights are finer, and right on processors with VNNI (or Arm's dot products) alone.

    Raises:
        SpaError: onnxruntime cannot quantise the file, or found nothing to quantise in it.
    """
    with Scratch(made.parent, made.name) as folder:
        plain, rough = folder / "plain.onnx", folder / "rough.onnx"
        _with_plain_weights(path, plain)
        try:
            # the quantiser advises a preparation on the root logger; it is done already
            with at_level(("",), logging.ERROR):
                quantize_dynamic(plain, rough, per_channel=True, weight_type=QuantType.QInt8,
                                 reduce_range=bits < 8, use_external_data_format=True)
        except Exception as problem:  # it raises its own kinds
            raise SpaError("the ONNX file cannot be quantised", where=str(path),
                           why=str(problem), fix="leave --int8 out") from problem
        model = ir.load(rough)
        arrays = [v.const_value for v in model.graph.initializers.values() if v.const_value]
        if not any(a.dtype in (ir.DataType.INT8, ir.DataType.UINT8) for a in arrays):
            raise SpaError("nothing in the ONNX file can be quantised", where=str(path),
                           why="it has no product or convolution with constant weights",
                           fix="leave --int8 out")
        _save(model, made, sum(a.nbytes for a in arrays), Path(folder))


def _save(model: ir.Model, made: Path, size: int, folder: Path) -> None:
    """Save whole or not at all, by way of a folder beside; large weights go to a .data file."""
    data = f"{made.name}.data" if size > INLINE_BYTES else None
    if data is None:
        ir.external_data.load_to_model(model)
    ir.save(model, folder / made.name, external_data=data)
    for name in filter(None, (data, made.name)):
        (folder / name).replace(made.with_name(name))


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


def integer_kernels() -> str:
    """Say how this processor multiplies int8, as far as the system tells it.

    `exact`: products are added in 32 bits (VNNI, Arm's dot products); `saturating`: two at a time
    in 16 bits; `unknown` where nothing says which.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    lines = (line.partition(":") for line in text.splitlines())
    known = {flag for key, _, flags in lines if key.strip() in ("flags", "Features")
             for flag in flags.split()}
    if known & EXACT:
        return "exact"
    return "saturating" if known & {"avx2", "ssse3"} else "unknown"


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
    """Bytes of a file with the weights that it reads from files beside it."""
    outside = [v.const_value for v in ir.load(path).graph.initializers.values()]
    return path.stat().st_size + sum(
        a.nbytes for a in outside if isinstance(a, ir.ExternalTensor))
