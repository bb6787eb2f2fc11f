"""Example inputs of transformers models, by what their configuration says."""

import pytest

from spacompiler.source import example_inputs


def test_an_encoder_and_decoder_of_two_configurations_gets_inputs_for_both():
    """The decoder's own configuration, which holds the vocabulary, says nothing of an encoder."""
    transformers = pytest.importorskip("transformers")
    part = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=24)
    module = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(part, part)).eval()
    inputs = example_inputs(module)
    assert module(**inputs).logits.shape == (*inputs["decoder_input_ids"].shape, 50)
