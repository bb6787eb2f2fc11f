"""Language models as users have them, caches on: they are traced whole, and their config stays."""

from __future__ import annotations

import pytest
import torch
import transformers

import spacompiler
from spacompiler.torch_backend.caches import cacheless, caches_off
from spacompiler.torch_backend.untouched import untouched

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
PAIR = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 48}
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        decoder_start_token_id=0), {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}),
    "bart": ("BartForConditionalGeneration", transformers.BartConfig(**PAIR),
             {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}),
    "whisper": ("WhisperForConditionalGeneration", transformers.WhisperConfig(
        **PAIR, num_mel_bins=16, max_source_positions=24, max_target_positions=32),
        {"input_features": torch.randn(2, 16, 48), "decoder_input_ids": IDS[:, :7]}),
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**TEXT), {"input_ids": IDS}),
    "positional": ("LlamaForCausalLM", transformers.LlamaConfig(**TEXT), (IDS,)),
    # its forward has no such keyword: only the config says it
    "answers": ("LlamaForQuestionAnswering", transformers.LlamaConfig(**TEXT),
                {"input_ids": IDS}),
    "xglm": ("XGLMForCausalLM", transformers.XGLMConfig(
        vocab_size=64, d_model=32, ffn_dim=48, num_layers=1, attention_heads=4),
        {"input_ids": IDS}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_with_its_cache_on_is_compiled_whole(kind):
    cls, config, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config)
    result = spacompiler.compile(model, inputs, target="body=80%", importance="magnitude",
                                 align=1, layout="any", dry_run=True)
    assert not [note for note in result.job.notes if "compiled in parts" in note]
    assert result.plan.costs["params"]["dense"] == sum(p.numel() for p in model.parameters())
    sides = {"encoder", "decoder"} if config.is_encoder_decoder else set()
    named = " ".join(result.plan.kept)
    assert result.plan.kept and all(f"{side}." in named for side in sides)
    assert config.use_cache is True and inputs is MODELS[kind][2] and "use_cache" not in inputs


def test_caches_are_switched_off_in_configs_inside_configs_and_on_again():
    inner = transformers.LlamaConfig(**TEXT)

    class Holder:
        def to_dict(self):
            return {}

    outer = Holder()
    outer.text_config, outer.use_cache = inner, False
    net = torch.nn.Linear(2, 2)
    net.config = outer
    with pytest.raises(KeyError), caches_off(net):
        assert inner.use_cache is False
        raise KeyError
    assert inner.use_cache is True and outer.use_cache is False


def test_a_call_that_brings_its_own_cache_keeps_it():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    given = {"past_key_values": object()}
    assert cacheless(model, given) == given
    assert cacheless(model, {"use_cache": True}) == {"use_cache": False}


def test_hooks_that_a_module_puts_on_itself_go_with_what_it_notes_of_them():
    """Else it puts them on once more when it next runs, and sees everything twice."""
    seen = []

    class Lazy(torch.nn.Linear):
        def forward(self, x):
            if not getattr(self, "hooked", False):
                self.register_forward_hook(lambda *call: seen.append(1))
                self.hooked = True
            return super().forward(x)

    net = Lazy(2, 2)
    with untouched(net):
        net(torch.ones(1, 2))
    assert not net._forward_hooks and not hasattr(net, "hooked")
    seen.clear()
    for _ in range(3):  # the first call puts the hook on
        net(torch.ones(1, 2))
    assert len(seen) == 2
