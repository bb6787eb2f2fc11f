"""Experts that loop over what tokens chose are found and cut as those of a grouped product."""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import spacompiler


def test_experts_of_an_eager_configuration_shrink_and_stay_eager() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, head_dim=8,
        experts_implementation="eager")
    net, ids = MixtralForCausalLM(config).eval(), torch.randint(0, 64, (2, 9))
    result = spacompiler.compile(
        net, {"input_ids": ids, "use_cache": False}, target="body~70%", importance="magnitude",
        align=1, latency=False, onnx=False)
    assert "compiled in parts" not in " ".join(result.job.notes)
    assert result.module.model.layers[0].mlp.experts.down_proj.shape[-1] < 48
    assert config._experts_implementation == "eager"
    assert result.module.config._experts_implementation == "eager"
    assert result.job.proof.holds
