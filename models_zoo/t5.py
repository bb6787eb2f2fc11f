"""T5: encoder and decoder joined by cross attention, with a relative bias shared by the layers.

The heads together are narrower than the model, and the MLP is gated.
"""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM, T5Config

from spacompiler.models_zoo._seeded import seeded, tokens
from spacompiler.models_zoo._tiny_transformers import VOCABULARY, Built, from_config


def build(seed: int = 0) -> Built:
    """The tiny model and its example inputs."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=36,
        d_kv=7,
        d_ff=44,
        num_layers=2,
        num_heads=5,
        feed_forward_proj="gated-gelu",
    )
    with seeded(seed):
        model = from_config(AutoModelForSeq2SeqLM, config)
        encoder_ids = tokens(VOCABULARY)
        decoder_ids = tokens(VOCABULARY, length=7)
    return model, {"input_ids": encoder_ids, "decoder_input_ids": decoder_ids}
