"""Attention that shares keys among queries is right for inputs that take another way, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import spacompiler

ASKED = {"roles": ("head",), "align": 1, "importance": "magnitude", "allocation": "uniform",
         "onnx": False, "latency": False}


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8)).eval()
    ids = torch.randint(0, 97, (2, 16))
    made = {layout: spacompiler.compile(model, {"input_ids": ids}, target="body=88%",
                                        layout=layout, **ASKED).module
            for layout in ("any", "uniform")}
    assert made["any"].model.layers[0].self_attn.q_proj.out_features == 16
    return made, ids


def test_a_mask_that_was_not_traced_is_served(pruned):
    made, ids = pruned
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = [made[layout](input_ids=ids, attention_mask=mask).logits[mask.bool()]
             for layout in ("any", "uniform")]
    torch.testing.assert_close(*found)


def test_generation_goes_on_from_a_mask(pruned):
    made, ids = pruned
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = [made[layout].generate(input_ids=ids, attention_mask=mask, max_new_tokens=4,
                                   do_sample=False) for layout in ("any", "uniform")]
    assert torch.equal(*found)


class Attention(nn.Module):
    """Four query heads to one of keys, which the operator shares, or the code repeats."""

    def __init__(self):
        super().__init__()
        self.num_key_value_groups = 4
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.o = nn.Linear(32, 32)

    def forward(self, x, mask=None):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if mask is not None:
            k, v = (t.repeat_interleave(self.num_key_value_groups, 1) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=mask is None)
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_number_that_only_another_way_reads_follows_the_heads():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 32)
    found = spacompiler.compile(Attention().eval(), (x,), target="params~60.6%", **ASKED).module
    assert found.q.out_features == 16
    assert found.num_key_value_groups == 2
    torch.testing.assert_close(found(x, torch.zeros(6, 6)), found(x))
