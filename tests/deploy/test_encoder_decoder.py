"""Encoder-decoders as two ONNX files: what was encoded is read with a cache, token by token.

Other types, those that hear among them: `python benchmarks/pairs.py`.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

from spacompiler.artifact.torch_checks import exported
from spacompiler.deploy import encoder_decoder
from spacompiler.deploy.decoder import check_causal_lm, places
from spacompiler.deploy.encoder_decoder import check_encoder_decoder, export_pair, pair_parity
from spacompiler.errors import SpaError, UsageError
from spacompiler.runtime import EncoderDecoder
from spacompiler.runtime.encoder_decoder import DECODER, ENCODER
from spacompiler.store.arrays import save_check
from spacompiler.store.folder import write_json


def t5() -> tuple[Any, dict[str, torch.Tensor]]:
    config = T5Config(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=1, num_heads=2,
                      decoder_start_token_id=0, eos_token_id=1)
    return T5ForConditionalGeneration(config), {"input_ids": torch.ones(2, 5, dtype=torch.long)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, example inputs, and the folder that both of its files lie in."""
    torch.manual_seed(0)
    model, example = t5()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("pair")
    export_pair(model.eval(), example, folder)
    return model, example, folder


def test_both_files_write_what_torch_writes(written: Any) -> None:
    for check in pair_parity(*written):
        assert check.same == check.tokens and check.max_rel < 1e-4


def test_a_damaged_decoder_is_told_by_verify(written: Any, tmp_path: Path) -> None:
    """Damaged before the hashes were taken, or by who wrote them anew."""
    model, example, folder = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_check(tmp_path / "check.safetensors", (), example, [])
    write_json(tmp_path / "recipe.json", {"model": "", "decoder": True, "onnx": True})
    structure = {"inputs": {"args": 0, "kwargs": ["input_ids"], "constants": {}}}

    def passed() -> dict[str, bool | None]:
        return {c.name: c.passed for c in exported(tmp_path, structure, model)}

    assert passed() == {"onnx": False, "encoder and decoder": True}
    decoder = onnx.load(tmp_path / DECODER)
    next(n for n in decoder.graph.node if n.op_type == "Relu").op_type = "Neg"
    onnx.save(decoder, tmp_path / DECODER)
    assert passed()["encoder and decoder"] is False
    (tmp_path / DECODER).unlink()
    (tmp_path / ENCODER).unlink()
    assert passed()["encoder and decoder"] is False


def test_what_was_encoded_is_read_once(written: Any) -> None:
    model, example, folder = written
    runner = EncoderDecoder(folder)
    with pytest.raises(UsageError, match=r"(?s)nothing was encoded.*read"):
        runner.generate([[0]], 4)
    with pytest.raises(UsageError, match="the encoder reads input_"):
        runner.read(sound=np.ones((1, 3)))
    runner.read(**{name: value[:1].numpy() for name, value in example.items()})
    with pytest.raises(UsageError, match="2 rows of tokens, 1 rows encoded"):
        runner.generate([[0], [0]], 4)
    with pytest.raises(UsageError, match="does not know of padding"):
        runner.generate([[0, 5]], 4, mask=[[0, 1]])
    inputs = {i.name for i in onnx.load(folder / "decoder.onnx").graph.input}
    assert inputs >= {"cross.0.key", "past_key_values.0.key"} and "encoded" not in inputs
    start = torch.zeros(1, 1, dtype=torch.long)
    made = model.generate(**{name: value[:1] for name, value in example.items()},
                          decoder_input_ids=start, max_new_tokens=4, do_sample=False)[0].tolist()
    assert [0, *runner.generate([[0]], 4)[0].tolist()][:len(made)] == made


def test_places_end_where_the_configuration_says() -> None:
    """Tables of places that grow when they are too short are traced where they are long enough."""
    model, _ = t5()
    assert places(model) is None
    model.config.max_target_positions = 448
    assert places(model) == 448
    model.config.max_position_embeddings = 4  # shorter than what is traced
    assert places(model) == 16


def test_what_an_encoder_may_give_besides_is_none() -> None:
    given = encoder_decoder._encoded_kind()(torch.ones(1))
    assert given.router_logits is None and given[0] is given.last_hidden_state
    assert copy.deepcopy(given).last_hidden_state == 1


def test_a_model_without_a_head_is_refused_before_it_is_traced() -> None:
    headless = T5Model(t5()[0].config)
    with pytest.raises(SpaError, match=r"(?s)T5Model.*no head that writes text"):
        check_encoder_decoder(headless)
    for kind in (LlamaModel, LlamaForSequenceClassification):
        with pytest.raises(SpaError, match=r"(?s)Llama.*no head that writes text"):
            check_causal_lm(kind(LlamaConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1)))


def test_a_model_that_reads_neither_text_nor_sound_is_refused() -> None:
    model, _ = t5()
    model.main_input_name = "pixel_values"
    with pytest.raises(SpaError, match="as an encoder and a decoder"):
        check_encoder_decoder(model)
