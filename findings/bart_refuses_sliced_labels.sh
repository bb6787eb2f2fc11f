#!/usr/bin/env bash
# transformers 5.23.0: BART's own loss refuses labels that are not contiguous.
#
# BartForConditionalGeneration flattens labels by view(-1): a slice of longer labels, which a
# collator that truncates gives, is refused though each of its values is valid. Most other heads
# flatten by reshape.
#
# Seen:
#     sliced: RuntimeError view size is not compatible with input tensor's size and stride ...
#     contiguous: the same values give a finite loss
# Expected: the same loss for both.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
env/bin/python - <<'PYTHON'
import torch
from transformers import BartConfig, BartForConditionalGeneration

torch.manual_seed(0)
net = BartForConditionalGeneration(BartConfig(
    vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)).eval()
ids = torch.randint(3, 64, (4, 9))
labels = ids[:, :7]
try:
    net(input_ids=ids, labels=labels)
    refused = False
except RuntimeError as problem:
    refused = "view size" in str(problem)
    print("sliced: RuntimeError", str(problem)[:67], "...")
finite = bool(net(input_ids=ids, labels=labels.contiguous()).loss.isfinite())
print("contiguous: the same values give a finite loss" if finite else "contiguous: no loss")
assert refused and finite, "it has changed"
PYTHON
