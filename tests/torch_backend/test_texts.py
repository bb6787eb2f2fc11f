"""Lengths come from the network, the example and the option; text serves where it is an input."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import spacompiler
from spacompiler.artifact.report import facts
from spacompiler.deploy.inputs import axis_names, other_inputs
from spacompiler.errors import UsageError
from spacompiler.pipeline.request import Windows, resolve
from spacompiler.torch_backend.read.export import trace

WORDS = 40
IDS = torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**SIZES, "max_position_embeddings": 24}


@pytest.fixture(scope="module")
def tokenizer():
    known = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[MASK]", *map(chr, range(97, 123))])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]",
                                                pad_token="[PAD]", mask_token="[MASK]")


def model(cls, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()


@pytest.mark.parametrize("cls, config, length", [
    ("BertForMaskedLM", "BertConfig", 24), ("CLIPTextModel", "CLIPTextConfig", 24),
    ("GPT2LMHeadModel", "GPT2Config", 24), ("RobertaForMaskedLM", "RobertaConfig", 22)])
def test_windows_are_no_longer_than_the_network(cls, config, length, tokenizer):
    net = model(cls, config, **TEXT, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    found = resolve(None, {"input_ids": IDS}, net, Windows(4), tokenizer=tokenizer)
    assert found.batches[0][1]["input_ids"].shape == (2, length)
    assert f"{length} tokens a window" in found.origin
    asked = resolve(None, {"input_ids": IDS}, net, Windows(4, 8), tokenizer=tokenizer)
    assert asked.batches[0][1]["input_ids"].shape == (2, 8) and "window" not in asked.origin


def test_windows_of_a_masked_language_model_are_masked(tokenizer):
    net = model("BertForMaskedLM", "BertConfig", **TEXT)
    example = {"input_ids": IDS, "token_type_ids": IDS * 0, "attention_mask": IDS * 0 + 1}
    found = resolve(None, example, net, Windows(8), tokenizer=tokenizer)
    ids, labels = (torch.cat([kwargs[k] for _, kwargs in found.batches])
                   for k in ("input_ids", "labels"))
    asked = labels >= 0
    assert torch.equal(asked, ids == tokenizer.mask_token_id) and 0.05 < asked.float().mean() < 0.3
    assert "15% of them masked" in found.origin
    assert set(found.batches[0][1]) == {*example, "labels"}
    result = spacompiler.compile(net, example, target="body=80%", align=1, layout="any",
                                 tokenizer=tokenizer, dry_run=True, onnx=False, samples=4)
    assert facts(result.job)["loss"] == {"name": "masked-token cross-entropy (logits)",
                                         "labels": "given with the batches"}


def test_a_decoder_reads_the_text_that_it_is_to_write(tokenizer):
    net = model("T5ForConditionalGeneration", "T5Config", vocab_size=WORDS, d_model=16, d_kv=8,
                d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    example = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}
    found = resolve(None, example, net, Windows(4, 16), tokenizer=tokenizer)
    kwargs = found.batches[0][1]
    assert torch.equal(kwargs["decoder_input_ids"][:, 1:], kwargs["input_ids"][:, :-1])
    assert not kwargs["decoder_input_ids"][:, 0].any()


def test_text_is_no_calibration_of_images(tokenizer, tmp_path):
    net = model("ViTForImageClassification", "ViTConfig", hidden_size=16, num_hidden_layers=1,
                num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8)
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    found = resolve(None, example, net, Windows(), tokenizer=tokenizer)
    assert found.origin == "example inputs only"
    (tmp_path / "text.txt").write_text("some words " * 99)
    with pytest.raises(UsageError, match="does not fit this network") as problem:
        resolve(str(tmp_path / "text.txt"), example, net, Windows(), tokenizer=tokenizer)
    assert "no rows of tokens" in problem.value.why


@pytest.mark.parametrize("cls, config", [("BertForSequenceClassification", "BertConfig"),
                                         ("GPT2LMHeadModel", "GPT2Config")])
def test_files_of_a_network_with_few_positions_are_checked_and_timed_within_them(
        cls, config, tokenizer, tmp_path, monkeypatch):
    seen = {}

    def failing(paths, feed, **options):
        seen.update({name: array.shape for name, array in feed.items()})
        raise MemoryError("none left")

    monkeypatch.setattr("spacompiler.runtime.latency.compare_latency", failing)
    sizes = {**TEXT, "max_position_embeddings": 9, "n_embd": 16, "n_layer": 1, "n_head": 2,
             "n_positions": 9}
    result = spacompiler.compile(model(cls, config, **sizes), {"input_ids": IDS},
                                 target="body=80%", align=1, layout="any", tokenizer=tokenizer,
                                 importance="magnitude", prove=False, out=tmp_path / "out")
    assert seen == {"input_ids": (1, 9)} and result.report["latency"] is None
    assert "latency could not be measured: MemoryError: none left" in result.report["notes"]
    assert all(row["shapes"]["input_ids"][1] <= 9 for row in result.report["onnx"])
    assert (tmp_path / "out" / "model.onnx").exists()


def test_sizes_that_a_program_asks_for_are_kept():
    class Boxes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(WORDS, 4)

        def forward(self, boxes):
            return self.table(boxes[:, :, 3]) + self.table(boxes[:, :, 0])

    traced = trace(Boxes(), (torch.ones(2, 9, 4).long(),))
    shapes = [other_inputs(traced, k)[0][0].shape for k in (0, 1)]
    assert all(shape[2] >= 4 for shape in shapes) and {shape[1] for shape in shapes} == {12, 6}
    assert other_inputs(traced, 0, 9)[0][0].shape[1] < 9
    with torch.no_grad():
        assert all(len(Boxes()(*other_inputs(traced, k)[0])) for k in (0, 1))


def test_axes_that_may_differ_have_names_of_their_own():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(WORDS, 4)

        def forward(self, ids, decoder_ids):
            return self.table(ids).mean(1, keepdim=True) + self.table(decoder_ids)

    names = axis_names(trace(Two(), (IDS, IDS[:, :7])))
    assert names == {"ids": {0: "batch", 1: "sequence"},
                     "decoder_ids": {0: "batch", 1: "decoder_ids_sequence"}}
    assert axis_names(trace(Two(), (IDS, IDS)))["decoder_ids"][1] == "sequence"
