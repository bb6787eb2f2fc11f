#!/usr/bin/env bash
# cyllama 0.2.18: a context's logits cannot be read, whatever the model.
#
# LlamaContext.get_logits and get_logits_ith ask the model for `n_vocab`, which LlamaModel does not
# have (its vocabulary does: `get_vocab().n_vocab`). Sampling works, as it asks llama.cpp itself.
#
# Seen:
#     sampled a token of the vocabulary: True
#     get_logits: 'cyllama.llama.llama_cpp.LlamaModel' object has no attribute 'n_vocab'
#     get_logits_ith: 'cyllama.llama.llama_cpp.LlamaModel' object has no attribute 'n_vocab'
# Expected: the logits of the last token.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
python3 -m venv env
env/bin/python -m pip install -q --no-compile --disable-pip-version-check cyllama==0.2.18 gguf==0.19.0 numpy==2.4.6
env/bin/python - <<'PYTHON'
import gguf
import numpy as np
from cyllama.llama import llama_cpp

size, width, layer = 16, 32, "blk.0."
writer = gguf.GGUFWriter("tiny.gguf", "llama")
for add, value in ((writer.add_vocab_size, size), (writer.add_context_length, 32),
                   (writer.add_embedding_length, width), (writer.add_block_count, 1),
                   (writer.add_feed_forward_length, width), (writer.add_head_count, 2),
                   (writer.add_head_count_kv, 2), (writer.add_rope_dimension_count, 16),
                   (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_tokenizer_model, "no_vocab")):
    add(value)
shapes = {"token_embd": (size, width), "output_norm": (width,), layer + "attn_norm": (width,),
          layer + "ffn_norm": (width,), **{layer + name: (width, width) for name in (
              "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")}}
generator = np.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

llama_cpp.disable_logging()
llama_cpp.llama_backend_init()
model = llama_cpp.LlamaModel("tiny.gguf", llama_cpp.LlamaModelParams(), verbose=False)
context = llama_cpp.LlamaContext(model, llama_cpp.LlamaContextParams())
context.decode(llama_cpp.llama_batch_get_one([1, 2, 3], 0))
greedy = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
greedy.add_greedy()
token = greedy.sample(context, -1)
print("sampled a token of the vocabulary:", 0 <= token < model.get_vocab().n_vocab)
for name, ask in (("get_logits", context.get_logits),
                  ("get_logits_ith", lambda: context.get_logits_ith(-1))):
    try:
        ask()
    except AttributeError as problem:
        print(f"{name}: {problem}")
    else:
        raise SystemExit(f"{name}: it has changed")
PYTHON
