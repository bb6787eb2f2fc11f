"""The loss that fits a network's head, and the labels of ordinary data loaders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import spacompiler
from spacompiler.artifact.report import facts, markdown
from spacompiler.errors import SpaError, UsageError
from spacompiler.torch_backend.gather.heads import fitting

IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR = {"vocab_size": 64, "d_model": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24, "max_position_embeddings": 32}
CLASSES = torch.tensor([0, 1, 1, 0])
SPANS = {"start_positions": CLASSES, "end_positions": CLASSES + 3}
SOUND = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "apply_spec_augment": False,
         "num_conv_pos_embedding_groups": 4, "pad_token_id": 0}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
          "intermediate_size": 24, "patch_size": 8, "num_labels": 5}
# head -> (class, config, inputs, labels, name without labels, name with them)
HEADS = {
    "causal": ("LlamaForCausalLM", "LlamaConfig", TEXT, {"input_ids": IDS}, {"labels": IDS},
               "next-token cross-entropy (logits)", "next-token cross-entropy (logits)"),
    "masked": ("BertForMaskedLM", "BertConfig", TEXT, {"input_ids": IDS},
               {"labels": IDS.masked_fill(IDS % 3 > 0, -100)}, "token cross-entropy (logits)",
               "masked-token cross-entropy (logits)"),
    "token": ("BertForTokenClassification", "BertConfig", TEXT, {"input_ids": IDS},
              {"labels": (IDS % 2).masked_fill(IDS % 3 > 0, -100)},
              "class cross-entropy (logits)", "class cross-entropy (logits)"),
    "sequence": ("LlamaForSequenceClassification", "LlamaConfig", TEXT, {"input_ids": IDS},
                 {"labels": CLASSES}, "class cross-entropy (logits)",
                 "class cross-entropy (logits)"),
    "several labels": ("BertForSequenceClassification", "BertConfig", TEXT, {"input_ids": IDS},
                       {"labels": torch.eye(2)[CLASSES]}, "class cross-entropy (logits)",
                       "class cross-entropy (logits)"),
    "regression": ("BertForSequenceClassification", "BertConfig", {**TEXT, "num_labels": 1},
                   {"input_ids": IDS}, {"labels": CLASSES.float()},
                   "class cross-entropy (logits)", "class cross-entropy (logits)"),
    "answers": ("BertForQuestionAnswering", "BertConfig", TEXT, {"input_ids": IDS}, SPANS,
                "class cross-entropy (start_logits, end_logits)",
                "class cross-entropy (start_logits, end_logits)"),
    "choice": ("BertForMultipleChoice", "BertConfig", TEXT, {"input_ids": IDS.reshape(2, 2, 9)},
               {"labels": CLASSES[:2]}, "class cross-entropy (logits)",
               "class cross-entropy (logits)"),
    "image": ("ViTForImageClassification", "ViTConfig", VISION,
              {"pixel_values": torch.randn(4, 3, 16, 16)}, {"labels": CLASSES},
              "class cross-entropy (logits)", "class cross-entropy (logits)"),
    "seq2seq": ("BartForConditionalGeneration", "BartConfig", PAIR,
                {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]},
                {"labels": IDS[:, :7].contiguous()},
                "next-token cross-entropy (logits)", "next-token cross-entropy (logits)"),
    "sound": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SOUND, {"input_values": torch.randn(4, 200)},
              {"labels": torch.tensor([[3, 4, -100]] * 4)}, "frame cross-entropy (logits)",
              "CTC (logits)"),
    "states": ("CLIPTextModel", "CLIPTextConfig", TEXT, {"input_ids": IDS}, {},
               "projection on a fixed random direction (last_hidden_state, pooler_output)", ""),
}


def built(kind):
    cls, config, options, inputs, labels, *names = HEADS[kind]
    torch.manual_seed(0)
    options = {**options, "ctc_loss_reduction": "mean"} if kind == "sound" else options
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    return model, inputs, labels, names


def tensors(made):
    return list(made.values())


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_has_its_loss(kind):
    """Named; with labels it is what transformers itself computes; without, it has a gradient."""
    model, inputs, labels, (plain, labelled) = built(kind)
    loss = fitting(model, inputs)
    results = tensors(model(**inputs, **({"use_cache": False} if kind in ("causal", "seq2seq")
                                         else {})))
    value = loss(results, (), inputs)
    assert loss.facts()["name"] == plain
    value.backward()
    assert value.isfinite() and any(p.grad is not None and p.grad.abs().max() > 0
                                    for p in model.parameters())
    if labels:
        given = fitting(model, inputs)
        want = model(**inputs, **labels).loss
        count = len(labels) if kind == "answers" else 1
        assert torch.allclose(given(results, (), {**inputs, **labels}), count * want, atol=1e-5)
        assert given.facts() == {"name": labelled, "labels": "given with the batches"}


def test_padding_is_no_next_token():
    model, inputs, *_ = built("causal")
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    results = tensors(model(**inputs, use_cache=False))
    got = fitting(model, inputs)(results, (), {**inputs, "attention_mask": mask})
    want = functional.cross_entropy(results[0][:, :5].reshape(-1, 64), IDS[:, 1:6].reshape(-1))
    assert torch.allclose(got, want, atol=1e-6)


class Tagger(nn.Module):
    """Reads tokens, from the left alone or from both sides."""

    def __init__(self, both: bool):
        super().__init__()
        self.table, self.both = nn.Embedding(64, 16), both
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 64)

    def forward(self, ids):
        x = self.table(ids)
        x = x + x.mean(1, keepdim=True) if self.both else x.cumsum(1)
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("both, name", [(False, "next-token cross-entropy"),
                                        (True, "class cross-entropy")])
def test_a_network_that_nothing_is_known_of_is_run_to_see_whether_it_looks_back(both, name):
    torch.manual_seed(0)
    net = Tagger(both)
    loss = fitting(net, (IDS,))
    loss([net(IDS)], (IDS,), {})
    assert loss.facts()["name"] == f"{name} (the results)"


def test_labels_that_do_not_fit_are_an_error():
    model, inputs, *_ = built("token")
    results = tensors(model(**inputs))
    for wrong, why in ((IDS, "class 63 of 2"), (CLASSES, "shape \\(4,\\)")):
        with pytest.raises(SpaError, match="do not fit the network's results") as problem:
            fitting(model, inputs)(results, (), {**inputs, "labels": wrong})
        assert why.replace("\\", "") in problem.value.why or "class" in problem.value.why
    with pytest.raises(SpaError, match="labels of a batch are no tensor"):
        fitting(model, inputs)(results, (), {**inputs, "labels": [{}]})


@pytest.mark.parametrize("kind", ["token", "states"])
def test_a_compile_scores_by_it_and_reports_it(kind):
    model, inputs, labels, (plain, _) = built(kind)
    result = spacompiler.compile(model, {**inputs, **labels}, target="body=70%", align=1,
                                 layout="any", dry_run=True, onnx=False, latency=False,
                                 calibration=[{**inputs, **labels}], repair="none")
    data = facts(result.job)
    if labels:
        assert data["loss"] == {"name": plain, "labels": "given with the batches"}
    else:
        assert data["loss"] == {"name": plain, "labels": "none"}
    assert f"Loss: {plain}; labels: " in markdown({**data, "bytes": {"dense": 1, "pruned": 1}})


def loaders():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 12, generator=g), torch.randint(3, (8,), generator=g)
    pairs = torch.utils.data.DataLoader(list(zip(x, y, strict=True)), batch_size=4)
    named = torch.utils.data.DataLoader(
        [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=4)
    beside = [({"x": a}, b) for a, b in pairs]
    return x, y, {"pairs": (pairs, (x[:4],)), "named": (named, {"x": x[:4]}),
                  "beside": (beside, {"x": x[:4]}), "alone": (pairs, {"x": x[:4]}),
                  "example": (pairs, next(iter(pairs))), "as named": (named, next(iter(named)))}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("kind", ["pairs", "named", "beside", "alone", "example", "as named"])
def test_labels_of_a_data_loader_go_to_the_loss(kind):
    """Each form gives the scores of a loss that is handed the labels; without any they differ."""
    x, y, forms = loaders()

    def scored(example, loader, **options):
        torch.manual_seed(0)
        result = spacompiler.compile(
            Net(), example, target="params=59%", align=1, calibration=loader, dry_run=True,
            onnx=False, latency=False, repair="none", **options)
        (scores,) = result.job.scores.values()
        return scores, facts(result.job)["loss"]["labels"]

    loader, example = forms[kind]
    scores, origin = scored(example, loader)
    batches = [(x[:4],), (x[4:],)]
    answers = {id(batch[0]): y[4 * i: 4 * i + 4] for i, batch in enumerate(batches)}
    want, _ = scored(batches[0], batches,
                     loss=lambda r, args, _: functional.cross_entropy(r[0], answers[id(args[0])]))
    assert origin == "given with the batches"
    np.testing.assert_allclose(scores, want, rtol=1e-4)
    if kind == "pairs":
        own, origin = scored(batches[0], batches)
        assert origin == "the network's own prediction" and not np.allclose(own, want, rtol=1e-2)


def test_training_without_labels_is_refused_where_a_loss_would_say_nothing():
    model, inputs, *_ = built("states")
    with pytest.raises(UsageError, match="nothing to train on"):
        spacompiler.compile(model, inputs, target="body=70%", align=1, importance="magnitude",
                            recovery="full", recover_data=[inputs, inputs], onnx=False,
                            latency=False)


def test_batches_of_a_loader_say_what_a_directory_is_called_with(tmp_path):
    """Masks and token types beside the tokens, as collators give them."""
    model, inputs, labels, _ = built("token")
    model.save_pretrained(tmp_path / "model")
    batch = {**inputs, "attention_mask": torch.ones_like(IDS), **labels}
    result = spacompiler.compile(str(tmp_path / "model"), target="body=75%", align=1,
                                 calibration=iter([batch, batch]), dry_run=True, onnx=False,
                                 latency=False, repair="none")
    assert set(result.job.trace.kwargs) == {"input_ids", "attention_mask"}
    assert facts(result.job)["loss"]["labels"] == "given with the batches"


def test_labels_among_example_inputs_are_no_inputs():
    model, inputs, labels, _ = built("answers")
    solved = spacompiler.inspect(model, {**inputs, **labels})
    assert len(solved.graph.inputs) == 1
