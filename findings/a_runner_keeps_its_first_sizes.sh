#!/usr/bin/env bash
# tinygrad 0.14.0: an OnnxRunner takes one size alone of an axis that the file leaves free.
#
# The sizes that the inputs of one call have in common are noted by the axis' name, so that they can
# be compared with each other, and stay noted: the next call with another batch is refused. A second
# runner of the same file takes that batch as its first.
#
# Seen:
#     batch 3: (3, 2)
#     batch 1: RuntimeError input x has mismatch on dim=0. Expected 3, received 1.
#     batch 1, another runner: (1, 2)
# Expected: one runner takes both.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check tinygrad==0.14.0 onnx==1.23.2 numpy==2.4.6
DEV=PYTHON env/bin/python - <<'PYTHON'
import onnx
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner

onnx.save(onnx.parser.parse_model('''
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[batch, 2] x) => (float[batch, 2] y) { y = Relu(x) }'''), "relu.onnx")


def told(runner, batch):
    try:
        return str(runner({"x": Tensor.ones(batch, 2)})["y"].numpy().shape)
    except RuntimeError as problem:
        return f"RuntimeError {problem}"


runner = OnnxRunner("relu.onnx")
said = [told(runner, 3), told(runner, 1), told(OnnxRunner("relu.onnx"), 1)]
for label, text in zip(("batch 3", "batch 1", "batch 1, another runner"), said, strict=True):
    print(f"{label}: {text}")
assert said[0] == "(3, 2)" and "Expected 3" in said[1] and said[2] == "(1, 2)", "it has changed"
PYTHON
