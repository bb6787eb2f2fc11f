#!/usr/bin/env bash
# onnxruntime 1.31.1 (file by torch 2.13.0): a Pad before an AveragePool of a smaller kernel is fused
# into a pool that is invalid.
#
# A valid file (ZeroPad2d before AvgPool2d with kernel 1, as in shake-shake networks) opens with graph
# optimisations off and fails with them on, which is the default: the Pad is fused into the pool,
# whose kernel it then exceeds.
#
# Seen:
#     ORT_DISABLE_ALL opens
#     ORT_ENABLE_ALL ... Pad should be smaller than kernel.
# Expected: both open.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.31.1 numpy==2.4.6
env/bin/python - <<'PYTHON'
import logging
import warnings

import onnxruntime
import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
onnxruntime.set_default_logger_severity(4)
net = nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.AvgPool2d(1, 2)).eval()
torch.onnx.export(net, (torch.randn(1, 3, 8, 8),), "pad.onnx", dynamo=True, verbose=False)
said = {}
for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    try:
        onnxruntime.InferenceSession("pad.onnx", options, providers=["CPUExecutionProvider"])
        said[level] = "opens"
    except Exception as problem:
        said[level] = "... " + str(problem).strip()[-38:]
    print(level, said[level])
assert said["ORT_DISABLE_ALL"] == "opens", "it has changed"
assert "smaller than kernel" in said["ORT_ENABLE_ALL"], "it has changed"
PYTHON
