"""GGUF files: every array in its place, read again by others; what llama.cpp has no graph for."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM

import spacompiler
from spacompiler.artifact.torch_checks import exported
from spacompiler.deploy.gguf_checks import check_gguf
from spacompiler.deploy.gguf_early import for_gguf
from spacompiler.deploy.gguf_file import paired, write_gguf
from spacompiler.deploy.gguf_table import ROWS
from spacompiler.errors import SpaError, UsageError
from spacompiler.request.recipe import Recipe

SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "max_position_embeddings": 64}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
           "gemma": "Gemma", "olmo2": "Olmo2", "granite": "Granite"}


def tiny(kind, **entries):
    """A small random model of a type; norms and biases are no ones and zeros."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_head=4, n_layer=2,
                                         n_positions=64, **entries)
        model = transformers.GPT2LMHeadModel(config)
    else:
        more = {"sliding_window": None} if kind == "mistral" else {}
        config = getattr(transformers, f"{CLASSES[kind]}Config")(**{**SMALL, **more, **entries})
        model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.1 if p.ndim > 1 else 0.8, 0.2)
    return model.float().eval()


def narrowed(model, layer, width):
    """Take neurons away from one layer."""
    mlp = model.model.layers[layer].mlp
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        linear = getattr(mlp, name)
        linear.weight = torch.nn.Parameter(linear.weight.detach().narrow(dim, 0, width).clone())
    return model


def fields(path):
    """Entries of a file by key."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    """Arrays of a file by name."""
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", ROWS)
def test_every_array_of_every_type_has_its_place(kind, tmp_path):
    model = tiny(kind)
    said = write_gguf(model, tmp_path / "m.gguf")
    count = len({t.data_ptr() for t in model.state_dict().values()})
    assert said["equal"] and said["tensors"] == len(tensors(tmp_path / "m.gguf")) == count


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_another_reader_finds_the_same_arrays(kind, tmp_path):
    """transformers' own reader, which turns rotary pairs back."""
    model = tiny(kind)
    write_gguf(model, tmp_path / "m.gguf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    for name, array in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], array)


def test_layers_of_unequal_width_are_lists(tmp_path):
    model = narrowed(tiny("llama", tie_word_embeddings=False), 1, 48)
    said = write_gguf(model, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert said["architecture"] == "deci" and not said["equal"]
    assert found["deci.feed_forward_length"] == [96, 48]
    assert found["deci.attention.head_count_kv"] == [2, 2]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 16
    stored = tensors(tmp_path / "m.gguf")["blk.0.attn_q.weight"].data
    assert np.array_equal(stored, paired(model.model.layers[0].self_attn.q_proj.weight
                                         .detach().numpy(), 4))


def test_unequal_qwen3_joins_queries_keys_and_values(tmp_path):
    tied = narrowed(tiny("qwen3", tie_word_embeddings=True), 0, 32)
    assert write_gguf(tied, tmp_path / "m.gguf")["architecture"] == "openelm"
    joined = tensors(tmp_path / "m.gguf")["blk.0.attn_qkv.weight"]
    assert joined.data.shape == (16 * (4 + 2 + 2), 64)
    with pytest.raises(SpaError, match="unequal width") as problem:
        write_gguf(narrowed(tiny("qwen3", tie_word_embeddings=False), 0, 32), tmp_path / "n.gguf")
    assert "no output layer" in problem.value.why


def test_an_array_that_has_no_place_is_named(tmp_path):
    model = tiny("llama")
    model.model.layers[1].register_parameter("odd", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(SpaError) as problem:
        write_gguf(model, tmp_path / "m.gguf")
    assert problem.value.where == "model.layers.1.odd"


@pytest.mark.parametrize("kind, entries, where", [
    ("mistral", {"sliding_window": 8}, "sliding_window=8"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "rope_parameters")])
def test_what_llama_cpp_computes_otherwise_is_refused(kind, entries, where, tmp_path):
    with pytest.raises(SpaError) as problem:
        write_gguf(tiny(kind, **entries), tmp_path / "m.gguf")
    assert problem.value.where == where
    assert not (tmp_path / "m.gguf").exists()


def test_embeddings_are_scaled_as_llama_cpp_does_it(tmp_path):
    model = tiny("gemma")
    write_gguf(model, tmp_path / "m.gguf")
    stored = tensors(tmp_path / "m.gguf")["output_norm.weight"].data
    assert np.array_equal(stored, model.model.norm.weight.detach().numpy() + np.float32(1))
    model.model.embed_tokens.embed_scale.fill_(7.0)
    with pytest.raises(SpaError) as problem:
        write_gguf(model, tmp_path / "n.gguf")
    assert problem.value.where == "embed_scale=7"


def test_models_that_are_no_language_models_are_refused():
    with pytest.raises(SpaError, match="cannot be written as GGUF"):
        check_gguf(torch.nn.Linear(2, 2))


def test_scaled_frequencies_and_other_scales_of_attention_are_in_the_file(tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny("llama", rope_parameters=scaled)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    write_gguf(model, tmp_path / "m.gguf")
    found = tensors(tmp_path / "m.gguf")
    plain = 1e4 ** -(np.arange(8) / 8)
    have = plain / found["rope_freqs.weight"].data
    assert np.allclose(have, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    query = paired(model.model.layers[0].self_attn.q_proj.weight.detach().numpy(), 4)
    assert np.allclose(found["blk.0.attn_q.weight"].data, query * 0.5 * 4, rtol=1e-5)


def pieces(folder, *left_out):
    """Save a tokenizer whose merges are those of SentencePiece's BPE, without some of them."""
    made = ["\u2581a", "ab", "\u2581ab", "ba", "abba", "\u2581abba"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {t: i for i, t in enumerate(
        ["<unk>", "<s>", "</s>", *bytes_, *made, "\u2581", "a", "b"])}
    merges = [(t[:i], t[i:]) for t in made for i in range(1, len(t))
              if t[:i] in vocabulary and t[i:] in vocabulary]
    words = Tokenizer(models.BPE(vocab=vocabulary, byte_fallback=True, unk_token="<unk>",
                                 merges=[m for m in merges if m not in left_out]))
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                             normalizers.Replace(" ", "\u2581")])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    return vocabulary


def test_a_tokenizer_of_sentencepiece_has_scores_where_its_merges_are_all_there(tmp_path):
    vocabulary = pieces(tmp_path)
    said = write_gguf(tiny("llama", vocab_size=270), tmp_path / "m.gguf", folder=tmp_path)
    found = fields(tmp_path / "m.gguf")
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert "SentencePiece" in said["tokenizer"] and found["tokenizer.ggml.model"] == "llama"
    assert list(vocabulary) == found["tokenizer.ggml.tokens"][:len(vocabulary)]
    assert scores["\u2581a"] > scores["ab"] > scores["\u2581abba"] > scores["a"]
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert found["tokenizer.ggml.add_space_prefix"] and found["tokenizer.ggml.bos_token_id"] == 1
    pieces(tmp_path, ("a", "b"))
    said = write_gguf(tiny("llama", vocab_size=270), tmp_path / "n.gguf", folder=tmp_path)
    assert "every way" in said["tokenizer"]
    assert fields(tmp_path / "n.gguf")["tokenizer.ggml.model"] == "no_vocab"


def test_quantised_rows_are_whole_blocks(tmp_path):
    write_gguf(tiny("llama"), tmp_path / "m.gguf", "q8_0")
    found = tensors(tmp_path / "m.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    with pytest.raises(UsageError, match=r"blk.1.ffn_down.weight cannot be stored as q8_0"):
        write_gguf(narrowed(tiny("llama"), 1, 40), tmp_path / "n.gguf", "q8_0")


def test_a_compile_for_a_runtime_takes_its_widths_and_writes_its_file(tmp_path):
    result = spacompiler.compile(tiny("llama"), {"input_ids": torch.ones(2, 5, dtype=torch.long)},
                                 target="body~60%", importance="magnitude", runtime="llama.cpp-q8",
                                 out=tmp_path / "o")
    assert result.module.config.intermediate_size % 32 == 0
    assert result.report["gguf"]["type"] == "q8_0"
    assert not (tmp_path / "o" / "model.onnx").exists()
    assert fields(tmp_path / "o" / "model.gguf")["tokenizer.ggml.model"] == "no_vocab"
    found = {c.name: c for c in exported(tmp_path / "o", {}, result.module)}
    assert found.keys() == {"gguf"} and found["gguf"].passed
    result.module.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1
    found = {c.name: c for c in exported(tmp_path / "o", {}, result.module)}
    assert found["gguf"].passed is False and "blk.1.ffn_up.weight" in found["gguf"].detail
    (tmp_path / "o" / "model.gguf").unlink()
    assert [c.passed for c in exported(tmp_path / "o", {}, result.module)] == [False]


@pytest.mark.parametrize("kind, given, made", [
    ("gpt2", {}, {"roles": ("channel",), "layout": "uniform"}),
    ("olmo2", {}, {"layout": "uniform"}), ("olmo2", {"layout": "any"}, {}), ("llama", {}, {})])
def test_a_plan_is_such_as_the_graph_can_hold(kind, given, made):
    asked, notes = Recipe("body=60%", gguf="f32", **given), []
    found = for_gguf(asked, tiny(kind), notes)
    assert found == dataclasses.replace(asked, **made) and len(notes) == len(made)


@pytest.mark.parametrize("kind, given, entries, words", [
    ("gpt2", {"roles": ("head",)}, {}, "head cannot go with --gguf.*--role channel"),
    ("olmo2", {"layout": "per-layer"}, {}, "unequal width.*sizes all layers alike"),
    ("mistral", {}, {"sliding_window": 8}, "sliding_window=8"),
    ("llama", {}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
     "rope_parameters")])
def test_what_no_plan_makes_writable_is_said_before_one_is_made(kind, given, entries, words):
    with pytest.raises(SpaError, match=f"(?s){words}"):
        for_gguf(Recipe("body=60%", gguf="f32", **given), tiny(kind, **entries), [])
