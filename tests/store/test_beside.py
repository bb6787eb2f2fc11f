"""The files beside a model: which go along, which are written anew, and which never do."""

import json

import pytest
import torch

import spacompiler
from spacompiler.store import beside

transformers = pytest.importorskip("transformers")

QUICK = {"importance": "magnitude", "align": 1, "latency": False, "onnx": False, "repair": "none",
         "calibration": "none"}
HIDDEN = 16
CARRIED = {
    "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n",
    "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}',
    "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"image_processor_type": "ViTImageProcessor"}',
    "processor_config.json": "{}",
    "modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "Transformer"}, '
                    '{"idx": 1, "name": "1", "path": "1_Pooling", "type": "Pooling"}]',
    "sentence_bert_config.json": '{"max_seq_length": 32}',
    "config_sentence_transformers.json": "{}",
    "1_Pooling/config.json": json.dumps({"word_embedding_dimension": HIDDEN}),
    "LICENSE": "do what you like",
    "NOTICE.txt": "made by me",
}
LEFT = {"code.py": "code and pickles", "training_args.bin": "code and pickles",
        "1_Pooling/pytorch_model.bin": "code and pickles", "model.gguf": "nothing is known of it",
        "trainer_state.json": "nothing is known of it"}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A directory as sentence-transformers writes it, and more."""
    folder = tmp_path_factory.mktemp("beside") / "embedder"
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=7, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    for name, text in {**CARRIED, **LEFT, "README.md": "# about the dense model"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def narrower(embedder, tmp_path_factory):
    """Fewer channels: what modules behind the network read stays as wide."""
    out = tmp_path_factory.mktemp("narrower") / "out"
    return spacompiler.compile(str(embedder), target="body=70%", out=out, layout="uniform",
                               **QUICK), out


def test_files_beside_a_model_go_along_as_they_lie(narrower):
    result, out = narrower
    for name, text in CARRIED.items():
        assert (out / name).read_text() == text
    assert (out / "README.dense.md").read_text() == "# about the dense model"
    files = result.report["files"]
    assert files["carried"] == sorted([*CARRIED, "README.md"])
    assert set(CARRIED) <= json.loads((out / "MANIFEST.json").read_text())["files"].keys()
    assert "1_Pooling/config.json" in (out / "report.md").read_text()


def test_code_and_pickles_never_go_along(narrower):
    result, out = narrower
    for name, why in LEFT.items():
        assert why in result.report["files"]["left"][name] and not (out / name).exists()
    assert not [p for p in out.rglob("*") if p.suffix in (".py", ".bin", ".pt", ".pkl")]


def test_configuration_and_weights_are_the_pruned_models(narrower):
    result, out = narrower
    assert {"config.json", "model.safetensors"} <= set(result.report["files"]["adapted"])
    config = json.loads((out / "config.json").read_text())
    assert config["intermediate_size"] < 32 and config["hidden_size"] == HIDDEN
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == config["hidden_size"]


@pytest.mark.parametrize("layout", ["uniform", "any"])
def test_pooling_is_as_wide_as_the_network_where_its_width_shrinks(tmp_path, layout):
    folder = tmp_path / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=7, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(CARRIED["1_Pooling/config.json"])
    result = spacompiler.compile(str(folder), target="params=75%", out=tmp_path / "out",
                                 layout=layout, roles=("hidden",), **QUICK)
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    width = result.module.get_input_embeddings().weight.shape[1]
    assert pooling["word_embedding_dimension"] == width < HIDDEN
    assert "1_Pooling/config.json" in result.report["files"]["adapted"]


def test_modules_that_hold_weights_of_the_old_width_stay_behind(tmp_path, embedder):
    out = tmp_path / "out"
    out.mkdir()
    dense = embedder / "2_Dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"in_features": HIDDEN, "out_features": 4}))
    try:
        found = beside.carry(embedder, out, {HIDDEN: 12})
        same = beside.carry(embedder, tmp_path, {})
    finally:
        (dense / "config.json").unlink()
        dense.rmdir()
    assert "reads 16 numbers, and the pruned network gives 12" in found.left["modules.json"]
    assert not (out / "1_Pooling").exists() and "vocab.txt" in found.carried
    assert "2_Dense/config.json" in same.carried


def test_a_link_out_of_the_directory_is_not_followed(tmp_path):
    """In the hub's cache, links lead to its own blobs."""
    (tmp_path / "secret").write_text("mine")
    cache = tmp_path / "models--a--b"
    folder, blobs = cache / "snapshots" / "0123", cache / "blobs"
    for place in (folder, blobs):
        place.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (folder / "tokenizer.json").symlink_to("../../blobs/1")
    (folder / "LICENSE").symlink_to("../../../secret")
    out = tmp_path / "out"
    out.mkdir()
    found = beside.carry(folder, out, {})
    assert found.carried == ["tokenizer.json"] and not (out / "tokenizer.json").is_symlink()
    assert "leaves the directory" in found.left["LICENSE"] and not (out / "LICENSE").exists()


def test_a_layout_of_our_own_keeps_them_too(tmp_path, embedder):
    spacompiler.compile(str(embedder), target="body=70%", out=tmp_path / "out", layout="any",
                        **QUICK)
    assert (tmp_path / "out" / "vocab.txt").exists() and (tmp_path / "out" / "LICENSE").exists()
    assert not (tmp_path / "out" / "config.json").exists()
