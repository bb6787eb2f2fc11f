#!/usr/bin/env bash
# torch 2.13.0 (onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.31.1): a Conv3d without a bias is
# exported to a file that ONNX Runtime refuses, if optimize=False.
#
# The exporter makes a bias of zeros. For Conv1d and Conv2d it has the shape (16,); for Conv3d it has
# (16, 1), which is no bias. With optimize=True folding takes the node away.
#
# Seen:
#     Conv2d optimize=False runs
#     Conv3d optimize=False ... bias must be a 1D tensor of size output_channels (16) ...
#     Conv3d optimize=True runs
# Expected: each of them runs.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
env/bin/python - <<'PYTHON'
import logging
import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
onnxruntime.set_default_logger_severity(4)


def outcome(kind, dims, optimize):
    x = torch.randn(2, 3, *(5,) * dims)
    torch.onnx.export(kind(3, 16, 3, bias=False).eval(), (x,), "conv.onnx", dynamo=True,
                      optimize=optimize, verbose=False)
    try:
        session = onnxruntime.InferenceSession("conv.onnx", providers=["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return "runs"
    except Exception as problem:
        return str(problem).replace("\n", " ")


said = []
for kind, dims, optimize in ((nn.Conv2d, 2, False), (nn.Conv3d, 3, False), (nn.Conv3d, 3, True)):
    said.append(outcome(kind, dims, optimize))
    print(kind.__name__, f"optimize={optimize}", said[-1])
assert said[0] == said[2] == "runs" and "1D tensor" in said[1], "it has changed"
PYTHON
