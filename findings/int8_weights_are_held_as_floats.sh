#!/usr/bin/env bash
# torchao 0.18.0: a linear layer with weights in 8 bits holds them as floats, too, until backward.
#
# `quantize_(layer, Int8WeightOnlyConfig())` stores a quarter of the bytes. Where something before the
# layer trains (adapters beside frozen weights), its forward pass leaves a float32 copy of the whole
# weight for the backward pass: with all layers of a network, the memory of the plain weights and a
# quarter of it more.
#
# Seen:
#     plain layer: nothing new is held
#     in 8 bits: [(torch.float32, (64, 48)), (torch.float32, (48,))]
# Expected: the 8 bits, which the gradient by the input can be computed from.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 torchao==0.18.0 numpy==2.4.6
env/bin/python - 2>/dev/null <<'PYTHON'
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def held(layer):
    """Shapes of arrays that a forward pass keeps, but for the layer's own and its input."""
    x = torch.randn(4, 64, requires_grad=True)
    own = {p.data_ptr() for p in (x, *layer.parameters()) if type(p.data) is torch.Tensor}
    kept = []

    def keep(array):
        if type(array) is torch.Tensor and array.data_ptr() not in own:
            kept.append((array.dtype, tuple(array.shape)))
        return array

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda array: array):
        layer(x)
    return kept


layer = torch.nn.Linear(64, 48, bias=False).requires_grad_(False)
plain = held(layer)
quantize_(layer, Int8WeightOnlyConfig())
short = held(layer)
print("plain layer:", plain or "nothing new is held")
print("in 8 bits:", short)
assert not plain and (torch.float32, (64, 48)) in short, "it has changed"
PYTHON
