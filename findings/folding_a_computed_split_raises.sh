#!/usr/bin/env bash
# onnxscript 0.7.2 (onnx 1.23.2, onnxruntime 1.31.1): constant folding raises on a SplitToSequence whose
# size is computed.
#
# The size is a scalar that is known at run time only (here a third of a varying dimension, as in an
# export of x.chunk(3)), and the folding asks its missing value for its rank.
#
# Seen:
#     ONNX Runtime runs the file: True
#     folding: RuntimeError from AttributeError("'NoneType' object has no attribute 'ndim'")
# Expected: a node that cannot be folded is left alone.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
env/bin/python - <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnxscript import ir, optimizer

model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["": 18]>
    thirds (float[n, 4] x) => (float[n, 4] y) <int64 three = {3}, int64 size> {
        shape = Shape <end: int = 1, start: int = 0> (x)
        length = Squeeze (shape)
        size = Div (length, three)
        parts = SplitToSequence <axis: int = 0, keepdims: int = 1> (x, size)
        y = ConcatFromSequence <axis: int = 0> (parts)
    }""")
onnx.checker.check_model(model, full_check=True)
x = np.arange(24, dtype=np.float32).reshape(6, 4)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
runs = np.array_equal(session.run(None, {"x": x})[0], x)
print("ONNX Runtime runs the file:", runs)
try:
    optimizer.fold_constants(ir.from_proto(model))
    cause = None
except Exception as problem:
    cause = problem.__cause__ or problem
    print("folding:", type(problem).__name__, "from", repr(cause))
assert runs and isinstance(cause, AttributeError), "it has changed"
PYTHON
