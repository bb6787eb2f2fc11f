#!/usr/bin/env bash
# peft 0.21.2: LoRA with ensure_weight_tying=True is merged twice, and its model cannot be copied.
#
# The embedding and the output layer of a tied model share one parameter, and each of the two adapted
# layers merges into it: merge_and_unload() gives W + 2 BA where the model computed with W + BA.
# copy.deepcopy of the adapted model fails, since the output layer keeps views that are no leaves.
#
# Seen:
#     copy: RuntimeError Only Tensors created explicitly by the user (graph leaves) support the ...
#     merged - (W + 1 BA): 2.5e-01
#     merged - (W + 2 BA): 3.0e-08
# Expected: a copy, and zeros in the first line of the merge.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 numpy==2.4.6
env/bin/python - <<'PYTHON'
import copy

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)).eval()
weight = base.lm_head.weight.detach().clone()
config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
net = peft.get_peft_model(base, config).eval()
layer = net.base_model.model.model.embed_tokens
torch.nn.init.normal_(layer.lora_embedding_A["default"], std=.1)
torch.nn.init.normal_(layer.lora_embedding_B["default"], std=.1)
try:
    copy.deepcopy(net)
    copied = True
except RuntimeError as problem:
    copied = False
    print("copy: RuntimeError", str(problem)[:75], "...")
delta = layer.get_delta_weight("default").detach()
merged = net.merge_and_unload().lm_head.weight
off = [(merged - weight - times * delta).abs().max().item() for times in (1, 2)]
for times, error in zip((1, 2), off):
    print(f"merged - (W + {times} BA): {error:.1e}")
assert not copied and off[0] > 1e-3 > 1e-6 > off[1], "it has changed"
PYTHON
