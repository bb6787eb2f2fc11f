#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): LoRA-GA fails on layers whose smaller side is less than twice the rank.
#
# The default direction "ArB2r" takes the gradient's singular directions r to 2 r for B. Where a layer
# has fewer than 2 r of them (the key projection of a grouped-query model, say), the two factors no
# longer fit each other. Plain LoRA of the same rank starts on the same layer.
#
# Seen (a layer of 16 outputs, 32 inputs):
#     rank 8 started
#     rank 12 RuntimeError mat1 and mat2 shapes cannot be multiplied (16x4 and 12x32)
#     rank 12, plain started
# Expected: a start from the directions that there are, or an error that names layer, rank and limit.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.23.0 numpy==2.4.6
env/bin/python - <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from torch import nn

warnings.simplefilter("ignore")


def outcome(rank, gradients=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    config = LoraConfig(r=rank, target_modules=["2"], **(dict(
        init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()) if gradients else {}))
    try:
        if gradients:
            preprocess_loraga(
                net, config, lambda: net(torch.randn(8, 32)).square().sum().backward())
        get_peft_model(net, config)
        return "started"
    except RuntimeError as problem:
        return f"RuntimeError {problem}"


said = {"rank 8": outcome(8), "rank 12": outcome(12), "rank 12, plain": outcome(12, False)}
for what, result in said.items():
    print(what, result)
assert said["rank 8"] == said["rank 12, plain"] == "started", "it has changed"
assert "cannot be multiplied" in said["rank 12"], "it has changed"
PYTHON
