#!/usr/bin/env bash
# torch 2.13.0: an einsum of whole numbers and floats is exported with a constant of another type.
#
# torch.einsum("i, j -> i j", whole, float32) is float32. torch.onnx.export folds it to a constant
# that says float32 in the exporter's own record and holds float64 in the file, so that whatever
# reads it beside float32 is refused by ONNX Runtime (rotary embeddings are often written so). With
# the whole numbers cast to float32 by hand, the file runs.
#
# Seen:
#     whole and float: ... bound to different types (tensor(float) and tensor(double)
#     both float: runs
# Expected: both run.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
env/bin/python - <<'PYTHON'
import onnxruntime
import torch


class Net(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.table = kind, torch.nn.Parameter(torch.rand(3))

    def forward(self, x):
        places = torch.arange(4, dtype=self.kind)
        return x * torch.einsum("i, j -> i j", places, self.table)


def told(kind):
    made = torch.onnx.export(Net(kind).eval(), (torch.ones(4, 3),), dynamo=True, verbose=False)
    try:
        onnxruntime.InferenceSession(made.model_proto.SerializeToString())
        return "runs"
    except Exception as problem:
        return str(problem)


one, other = told(torch.int64), told(torch.float32)
print("whole and float:", one[-110:])
print("both float:", other)
assert "different types" in one and other == "runs", "it has changed"
PYTHON
