#!/usr/bin/env bash
# transformers 5.23.0: from_pretrained zeroes a stored padding row, and does not say so.
#
# FunnelPreTrainedModel and YoutuPreTrainedModel initialise the word embedding by zeroing a slice,
# `weight[padding_idx]`. The mark by which initialisers leave loaded arrays alone sits on the
# parameter, not on a slice of it: the row is zeroed after it was loaded.
#
# Seen:
#     stored [1.0, 1.0, 1.0, 1.0] loaded [0.0, 0.0, 0.0, 0.0]
#     told of it: {missing_keys: [], unexpected_keys: [], mismatched_keys: [], error_msgs: []}
# Expected: what is stored, or a word about it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
env/bin/python - <<'PYTHON'
import torch
from safetensors.torch import load_file
from transformers import FunnelConfig, FunnelForMaskedLM

net = FunnelForMaskedLM(FunnelConfig(
    vocab_size=8, d_model=16, n_head=2, d_head=8, d_inner=16, block_sizes=[1],
    num_decoder_layers=1, pad_token_id=0))
with torch.no_grad():
    net.get_input_embeddings().weight[0] = 1.0
net.save_pretrained("funnel")
stored = load_file("funnel/model.safetensors")["funnel.embeddings.word_embeddings.weight"][0, :4]
again, told = FunnelForMaskedLM.from_pretrained("funnel", output_loading_info=True)
loaded = again.get_input_embeddings().weight[0, :4]
print("stored", stored.tolist(), "loaded", loaded.tolist())
print("told of it:", {k: sorted(v) for k, v in told.items()})
assert stored.eq(1).all() and loaded.eq(0).all() and not any(told.values()), "it has changed"
PYTHON
